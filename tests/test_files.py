"""Files and folders that survive a kill at any moment, on file systems that can do less than others."""

import errno
import os
import shutil
import signal
from pathlib import Path

import launch
import pytest

from custom_diffusion import files
from custom_diffusion.files import can_hold, list_checkpoints, recover, remove_folder, sync, whole_file, whole_folder
from custom_diffusion.training.checkpoints import read_checkpoint

# What a process does to the disk while it replaces or removes a folder, and how often.
CALLS = [(Path, "mkdir"), (Path, "replace"), (shutil, "rmtree"), (files, "sync"), (files, "open_to_others")]
USERS_OWN = [".foo.part", ".x.tmp", ".out.12345678.part", ".checkpoint-1.part", "samples/.final.png.12345678.part"]


def killed_after(num_calls, work):
    """Run `work` in a process of its own that is killed after this many calls; whether it was, or came to its end."""
    child = os.fork()
    if child == 0:
        left = [num_calls]

        def counted(call):
            def count(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **kwargs)

            return count

        try:
            for holder, name in CALLS:
                setattr(holder, name, counted(getattr(holder, name)))
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def fill(path, content):
    with whole_folder(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(content)


def content_of(path):
    """What `fill` wrote, if the folder is whole."""
    assert sorted(file.name for file in path.iterdir()) == ["a", "b"]
    (content,) = {file.read_text() for file in path.iterdir()}
    return content


def keep_users_own(folder):
    for name in USERS_OWN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")


def left_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob(".*")}


@pytest.mark.parametrize("next_start", ["recovers", "writes it again"])
def test_killed_while_a_folder_is_replaced_one_of_the_two_survives(next_start, tmp_path):
    survivors = []
    while True:
        folder = tmp_path / str(len(survivors))
        path = folder / "checkpoint-1"
        fill(path, "old")
        keep_users_own(folder)
        killed = killed_after(len(survivors), lambda path=path: fill(path, "new"))
        if next_start == "recovers":
            recover(folder)
            survivors.append(content_of(path))
            assert left_in(folder) == set(USERS_OWN)
        else:
            with pytest.raises(ZeroDivisionError), whole_folder(path):
                survivors.append(content_of(path))  # before the writing, too
                raise ZeroDivisionError
            assert content_of(path) == survivors[-1]
        if not killed:
            break
    assert len(survivors) > 6
    assert survivors == sorted(survivors, reverse=True), "new, and then old again"
    assert set(survivors) == {"old", "new"}


def test_killed_while_a_folder_is_removed_it_is_whole_or_gone(tmp_path):
    for num_calls in range(10):
        folder = tmp_path / str(num_calls)
        fill(folder / "checkpoint-1", "old")
        keep_users_own(folder)
        killed = killed_after(num_calls, lambda folder=folder: remove_folder(folder / "checkpoint-1"))
        recover(folder)
        if list_checkpoints(folder):
            assert killed
            assert content_of(folder / "checkpoint-1") == "old"
        assert left_in(folder) == set(USERS_OWN)
        if not killed:
            break
    assert num_calls == 2


def test_a_run_in_a_folder_inside_is_left_alone(tmp_path):
    with whole_folder(tmp_path / "other-run" / "checkpoint-1") as folder:
        recover(tmp_path)
        assert folder.is_dir()


def test_a_folder_of_a_longer_name_is_not_taken_for_the_other(tmp_path):
    other = tmp_path / f".out.v2.12345678{files.READY}"
    other.mkdir()
    fill(tmp_path / "out", "new")
    assert other.is_dir()


def kill_between_renames():
    """The run is killed when the old checkpoint has made room and the new one has not yet taken its place."""
    replace = Path.replace

    def replace_and_die(self, target):
        if self.name.endswith(files.READY):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replace_and_die


def test_a_run_killed_between_two_renames_is_resumed(run_arguments, tmp_path, trained_difference):
    arguments = run_arguments | {"max_train_steps": 2, "checkpointing_steps": 1, "output_dir": tmp_path / "whole"}
    launch.Run(launch.FORKED, arguments, tmp_path / "log").ok()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    arguments |= {"output_dir": tmp_path / "out"}
    again = launch.run(launch.FORKED, arguments, tmp_path / "log2", changed_by=kill_between_renames)
    assert again.status == -signal.SIGKILL
    assert not list_checkpoints(tmp_path / "out")

    resumed = launch.Run(launch.FORKED, arguments | {"resume_from_checkpoint": "checkpoint-1"}, tmp_path / "log3").ok()
    assert "Resuming from checkpoint-1" in resumed
    assert trained_difference(tmp_path / "whole", tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob(".*"))


# File systems

REFUSALS = [errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS]


def refuse(*names, number):
    """A file system that answers these functions of `os` with an error."""

    def answer(*_, **__):
        raise OSError(number, os.strerror(number))

    for name in names:
        setattr(os, name, answer)


def refuse_chmod_and_fsync():
    refuse("chmod", "fsync", number=errno.EPERM)


def test_a_run_on_a_file_system_that_refuses_chmod_and_fsync(run_arguments, tmp_path):
    arguments = run_arguments | {"max_train_steps": 2, "checkpointing_steps": 1, "output_dir": tmp_path / "out"}
    arguments |= {"validation_prompt": "cat", "num_validation_images": 1}
    for resume in (None, "latest"):  # the second time over what is there
        arguments["resume_from_checkpoint"] = resume
        run = launch.Run(launch.FORKED, arguments, tmp_path / "log", changed_by=refuse_chmod_and_fsync)
        run.ok()
    assert read_checkpoint(tmp_path / "out" / "checkpoint-2").step == 2
    assert (tmp_path / "out" / "samples" / "final-0.png").is_file()


@pytest.mark.parametrize("name", ["chmod", "fsync"])
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_what_a_file_system_cannot_do_is_left_out(number, name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, name, getattr(os, name))  # to be put back
    refuse(name, number=number)
    fill(tmp_path / "out", "new")
    with whole_file(tmp_path / "file") as path:
        path.write_text("x")
    assert content_of(tmp_path / "out") == "new"
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_what_a_disk_cannot_hold_is_told(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", os.fsync)  # to be put back
    refuse("fsync", number=number)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        fill(tmp_path / "out", "new")
    with pytest.raises(OSError, match=os.strerror(number)), whole_file(tmp_path / "file") as path:
        path.write_text("x")
    assert list(tmp_path.iterdir()) == []


# Names


def like_fat(number=errno.EINVAL):
    """A file system that takes no < or >, as those of Windows."""
    touch = Path.touch

    def touch_plain_names(self, *args, **kwargs):
        if set(self.name) & set('<>:"|?*'):
            raise OSError(number, os.strerror(number))
        return touch(self, *args, **kwargs)

    Path.touch = touch_plain_names


def test_a_token_that_cannot_be_a_file_name_there_is_told_before_training(run_arguments, tmp_path):
    changes = {"modifier_token": "<1>+<2>", "initializer_token": "ktn+pll", "instance_prompt": "a <1> <2>"}
    changes |= {"output_dir": tmp_path / "new folder" / "out"}
    run = launch.run(launch.FORKED, run_arguments | changes, tmp_path / "log", changed_by=like_fat)
    assert run.status == 2
    (message,) = run.messages
    assert "--modifier_token: the file system of" in message
    assert "cannot hold a file named '<1>.safetensors'; use --modifier_token new1+new2, in the prompts too" in message
    assert "Steps" not in run.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOENT], ids=errno.errorcode.get)
def test_what_a_folder_can_hold(number, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", Path.touch)  # to be put back
    like_fat(number)
    assert not can_hold(tmp_path / "new" / "folder", "<new1>.safetensors")
    assert can_hold(tmp_path / "new" / "folder", "new1.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_real_limits_of_a_name(tmp_path):
    assert can_hold(tmp_path, "<new1>.safetensors")
    assert not can_hold(tmp_path, "x" * 250 + ".safetensors")
    with whole_file(tmp_path / max((n * "x" for n in range(256) if can_hold(tmp_path, n * "x")), key=len)) as path:
        path.touch()  # the longest name that it says fits, with all that is added to it while it is written


def full():
    """A file system without room for another file."""

    def touch(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    Path.touch = touch


def test_a_full_disk_ends_all_processes_in_one_line(run_arguments, tmp_path):
    runs = launch.run_group(2, run_arguments | {"output_dir": tmp_path / "out"}, tmp_path / "log", changed_by=full)
    assert [run.wait() for run in runs] == [2, 2]
    (message,) = runs[0].messages
    assert message.startswith("--output_dir: cannot write to ")
    assert "No space left on device" in message
    assert not any("Traceback" in run.output for run in runs)


def test_a_folder_that_takes_nothing_is_not_blamed_on_the_name(tmp_path, monkeypatch):
    def touch(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(OSError, match="Read-only"):
        can_hold(tmp_path, "<new1>.safetensors")
