"""Where class images come from, a file each: a class that follows `candidates.Source`, and the few flags that choose it.

`retrieve.py` finds the files by itself, asks the sources in the order of the files' names, and calls of each
    add_flags(parser)           adds its flags to an `argparse.ArgumentParser`
    is_named(args) -> bool      whether its flags ask for it
    is_default() -> bool        whether it is asked where no source is named
    flag_problems(args, used)   yields a line for each flag that cannot work; `used`: whether this source will be asked
    from_flags(args) -> Source

Importing one must stay quick: `--help` waits for it.
"""
