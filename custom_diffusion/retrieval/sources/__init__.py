"""Where class images come from, a file each: a class that follows `candidates.Source`, and the few flags that choose it.

`retrieve.py` finds the files by itself and calls their `add_flags(parser)`, `is_named(args)` (its flags ask for it),
`is_default()` (it is asked when no source is named), `flag_problems(args, used)` and `from_flags(args)`. Importing one must
stay quick: `--help` waits for it.
"""
