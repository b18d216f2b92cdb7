"""The cache of compiled kernels: one folder that all processes of a user share.

A file lies there as ``<key>-<compiler>-<digest>.so``. The key stands for sources, flags and
PyTorch. The compiler, with its C++ library, has a place of its own, so that a process without a
compiler finds what another has compiled. The digest is that of the content: one rename publishes
both, and a file that was cut short is noticed before it is loaded, which would end the process.

Loading a library runs its code. So the folder and the file must belong to the user or to root, and
nobody else may write them. What root has compiled into a container image is taken by its users.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE = 1.0  # seconds of waiting for another process before a line says so


class BuildError(RuntimeError):
    """A kernel cannot be compiled or loaded here; the message says why and the mend."""


def cache_dir() -> Path:
    """`DWL_KERNELS_CACHE`, else `dwl_kernels` in the user's cache folder.

    Raises:
        BuildError: the user has no home.
    """
    try:
        if named := os.environ.get("DWL_KERNELS_CACHE"):
            return Path(named).expanduser().absolute()
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not home.is_absolute():  # the XDG specification says to ignore it then
            home = Path.home() / ".cache"
        return home / "dwl_kernels"
    except RuntimeError as error:
        raise BuildError(
            f"there is no home folder to keep compiled kernels in ({error}); "
            "set DWL_KERNELS_CACHE to a folder that can be written"
        ) from error


def cached(
    key: str,
    suffix: str,
    compiler: Callable[[], str],
    compile_to: Callable[[Path], Path],
    what: str,
) -> Path:
    """The file of `key` that this compiler made, which `compile_to` makes where there is none.

    Without a compiler, or where the cache cannot be written, a file that another compiler made
    serves as well, the newest first.

    Args:
        key: stands for all that the file depends on, but for the compiler.
        suffix: of the file, such as ``".so"``.
        compiler: gives the compiler's name here; raises `BuildError` where there is none.
        compile_to: compiles into a folder and returns the file.
        what: is compiled, in words.

    Raises:
        BuildError: the cache cannot be used or trusted, or what the two functions raise.
    """
    folder = Path(os.path.realpath(cache_dir()))  # once: a link may point elsewhere a moment later
    missing = None
    try:
        own = f"{key}-{compiler()}"
    except BuildError as error:
        own, missing = key, error
    try:
        if os.path.lexists(folder):
            _trust_folder(folder)
            found = _newest(folder, own, suffix)
            if found is None and not os.access(folder, os.W_OK, effective_ids=True):
                found = _newest(folder, key, suffix)
            if found is not None:
                return found
            if missing is not None and (damaged := _files(folder, key, suffix)):
                raise BuildError(f"{damaged[0]} is damaged: its content has changed; {missing}")
        if missing is not None:
            raise missing
        _make(folder)
        _trust_folder(folder)
        with _locked(folder / f"{own}.lock", what):
            return _newest(folder, own, suffix) or _compiled(folder, own, suffix, compile_to)
    except OSError as error:
        raise BuildError(
            f"the cache of compiled kernels cannot be used: {error}; "
            "set DWL_KERNELS_CACHE to a folder that can be written"
        ) from error


def does_not_load(library: Path, error: BaseException) -> BuildError:
    """What to raise where the system's loader refuses a library."""
    return BuildError(
        f"{library} does not load: {error}; delete it, and it is compiled anew, or set "
        "DWL_KERNELS_CACHE to a folder whose libraries may run"
    )


def digest(*parts: str | bytes) -> str:
    """Sixteen digits that stand for the parts, in this order."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        whole.update(b"%d:" % len(content) + content)
    return whole.hexdigest()[:16]


def _newest(folder: Path, start: str, suffix: str) -> Path | None:
    """The newest file of this start whose content fits its name."""
    written = {file: _when_written(file) for file in _files(folder, start, suffix)}
    whole = [file for file in written if written[file]]
    return max(whole, key=lambda file: written[file], default=None)


def _files(folder: Path, start: str, suffix: str) -> list[Path]:
    names = os.listdir(folder)  # unlike `glob`, it raises where the folder cannot be read
    return [folder / n for n in names if n.startswith(f"{start}-") and n.endswith(suffix)]


def _when_written(path: Path) -> int:
    """When a file was written; 0 if its content does not fit its name.

    Raises:
        BuildError: the file is not to be trusted.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # removed a moment ago; a link
            return 0
        raise
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return 0
        _trust(path, status, "delete it, and it is compiled anew")
        fits = path.stem.endswith(f"-{digest(file.read())}")
    return status.st_mtime_ns if fits else 0


def _trust_folder(folder: Path) -> None:
    """Raise where others could put a library into this folder, or another folder into its place."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    mend = "set DWL_KERNELS_CACHE to a folder of your own"
    if status.st_uid == os.geteuid() and not status.st_mode & stat.S_ISVTX:
        mend = f"`chmod go-w {shlex.quote(str(folder))}`, or {mend}"
    _trust(folder, status, mend)
    # Who can write above it can put a folder of their own into its place after this check. Groups
    # are left alone there: many systems let the user's own group write all that the user makes.
    for above in reversed(folder.parents):
        mode = above.stat().st_mode
        if not mode & stat.S_IXOTH:
            return  # nobody else gets any further
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise BuildError(
                f"compiled kernels in {folder} could be anybody's, because all users can write "
                f"{above} (mode {stat.S_IMODE(mode):o}); `chmod o-w {shlex.quote(str(above))}`, "
                "or set DWL_KERNELS_CACHE to a folder of your own"
            )


def _trust(path: Path, status: os.stat_result, mend: str) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (0, os.geteuid()):
        fault = f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
    elif mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"can be written by other users (mode {mode:o})"
    else:
        return
    raise BuildError(f"{path} holds code that would run here, but {fault}; {mend}")


def _make(folder: Path) -> None:
    """Make a folder, and those above it, for this user alone whatever the umask."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock, which the system frees when its holder dies: a killed build blocks nobody."""
    from filelock import FileLock, Timeout  # here, because it takes 40 ms

    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        print(
            f"dwl_kernels: waiting for another process that compiles {what} ...",
            file=sys.stderr,
            flush=True,
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compiled(folder: Path, start: str, suffix: str, compile_to: Callable[[Path], Path]) -> Path:
    """Compile into the cache, for the holder of its lock."""
    for damaged in _files(folder, start, suffix):
        damaged.unlink(missing_ok=True)
    for left in _files(folder, start, ".tmp"):  # by a killed build
        shutil.rmtree(left, ignore_errors=True)
    # A new name each time: a compiler of the killed build may still be writing.
    work = Path(tempfile.mkdtemp(prefix=f"{start}-", suffix=".tmp", dir=folder))
    try:
        file = compile_to(work)
        file.chmod(0o644)  # whatever the umask; the folder decides who reads it
        target = folder / f"{start}-{digest(file.read_bytes())}{suffix}"
        return file.replace(target)  # in one step
    finally:
        shutil.rmtree(work, ignore_errors=True)
