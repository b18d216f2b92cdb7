"""The cache of compiled kernels: only code of the user's own runs, and only whole files load.

`compile` here writes a few bytes, so that nothing but the cache takes part.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cache_compiler import Compiler, without_compiler

from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends.cache import BuildError

OTHER = 12345  # a user that no process here runs as
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def user(number: int) -> Iterator[None]:
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user reaches, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp()).resolve()
    if not all(above.stat().st_mode & 0o001 for above in folder.parents):
        pytest.skip("other users do not reach the folder of temporary files")
    folder.chmod(0o755)
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(folder / "cache"))
    yield folder
    shutil.rmtree(folder)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


# Who may write ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_folders_and_files_are_the_users_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(tmp_path / "above" / "cache"))
    with umask(mask):
        library = Compiler().get()
    assert mode(tmp_path / "above") == mode(tmp_path / "above" / "cache") == 0o700
    assert mode(library) == 0o644
    assert [mode(lock) for lock in library.parent.glob("*.lock")] == [0o600]


@root_only
def test_folder_of_another_user_is_refused(cache: Path) -> None:
    Compiler().get()
    os.chown(cache, OTHER, OTHER)
    with pytest.raises(BuildError) as caught:
        Compiler().get()
    assert f"{cache} holds code" in str(caught.value)
    assert f"belongs to user {OTHER}, and this process runs as user 0" in str(caught.value)
    assert "set DWL_KERNELS_CACHE to a folder of your own" in str(caught.value)
    assert "chmod" not in str(caught.value)  # it would not help


@root_only
def test_empty_folder_of_another_user_is_refused_before_anything_is_written(cache: Path) -> None:
    cache.mkdir()
    os.chown(cache, OTHER, OTHER)
    with pytest.raises(BuildError, match=f"belongs to user {OTHER}"):
        Compiler().get()
    assert list(cache.iterdir()) == []


@root_only
@pytest.mark.parametrize("get", [Compiler().get, without_compiler])
def test_library_of_another_user_is_refused(cache: Path, get: Callable[[], Path]) -> None:
    library = Compiler().get()
    os.chown(library, OTHER, OTHER)
    with pytest.raises(BuildError) as caught:
        get()
    assert f"{library} holds code" in str(caught.value)
    assert f"belongs to user {OTHER}" in str(caught.value)
    assert "delete it" in str(caught.value)
    library.unlink()
    assert Compiler().get() == library


@pytest.mark.parametrize("bits", [0o770, 0o720, 0o757, 0o777, 0o2775])
def test_folder_that_others_can_write_is_refused_until_it_is_mended(cache: Path, bits: int) -> None:
    library = Compiler().get()
    cache.chmod(bits)
    with pytest.raises(BuildError) as caught:
        Compiler().get()
    assert f"{cache} holds code" in str(caught.value)
    assert f"can be written by other users (mode {bits:o})" in str(caught.value)
    assert f"`chmod go-w '{cache}'`, or set DWL_KERNELS_CACHE" in str(caught.value)
    subprocess.run(["chmod", "go-w", str(cache)], check=True)
    assert Compiler().get() == library


def test_folder_shared_by_all_as_tmp_is_keeps_its_mode(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o1777)
    with pytest.raises(BuildError, match=r"mode 1777.*set DWL_KERNELS_CACHE") as caught:
        Compiler().get()
    assert "chmod" not in str(caught.value)


@pytest.mark.parametrize("bits", [0o664, 0o646, 0o666])
@pytest.mark.parametrize("get", [Compiler().get, without_compiler])
def test_library_that_others_can_write_is_refused(
    cache: Path, get: Callable[[], Path], bits: int
) -> None:
    library = Compiler().get()
    library.chmod(bits)
    with pytest.raises(BuildError, match=rf"by other users \(mode {bits:o}\); delete it"):
        get()


@root_only
def test_link_to_a_folder_of_another_user_is_refused(cache: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    cache.symlink_to(theirs)
    with pytest.raises(BuildError, match=f"theirs holds code.*belongs to user {OTHER}"):
        Compiler().get()
    assert list(theirs.iterdir()) == []


def test_link_to_a_folder_of_the_user_is_followed(cache: Path, tmp_path: Path) -> None:
    cache.symlink_to(tmp_path / "scratch")
    assert Compiler().get().parent == tmp_path / "scratch"


def test_link_in_place_of_a_library_is_not_followed(cache: Path, tmp_path: Path) -> None:
    library = Compiler().get()
    library.rename(tmp_path / "moved.so")
    library.symlink_to(tmp_path / "moved.so")
    compiler = Compiler()
    assert compiler.get() == library
    assert compiler.calls == 1
    assert not library.is_symlink()
    assert (tmp_path / "moved.so").read_bytes() == b"a library"


def test_link_in_place_of_a_lock_is_not_followed(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    cache.mkdir(mode=0o700)
    (cache / "cpu-key-gcc.lock").symlink_to(outside)
    with pytest.raises(BuildError, match=r"cannot be used.*cpu-key-gcc\.lock"):
        Compiler().get()
    assert outside.read_text() == "precious"


def test_folder_that_all_can_replace_is_refused(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Compiler().get()
    public.chmod(0o777)
    with pytest.raises(BuildError, match=rf"all users can write {public}.*chmod o-w {public}"):
        Compiler().get()
    public.chmod(0o1777)  # as /tmp: others cannot rename the folder
    assert Compiler().get() == library
    public.chmod(0o777)
    (public / "private").mkdir(mode=0o700)  # others do not get this far
    (public / "private" / "open").mkdir()
    (public / "private" / "open").chmod(0o777)
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(public / "private" / "open" / "cache"))
    with pytest.raises(BuildError, match=rf"all users can write {public} "):
        Compiler().get()
    public.chmod(0o755)
    assert Compiler().get().parent == public / "private" / "open" / "cache"


@root_only
def test_what_root_compiled_serves_other_users_who_cannot_write_it(public: Path) -> None:
    (public / "cache").mkdir(mode=0o755)  # as an image is made for a user
    with umask(0o077):
        library = Compiler().get()
    with user(OTHER):
        assert Compiler().get() == library
        assert without_compiler() == library
        assert Compiler("clang").get() == library  # it cannot be compiled anew
        with pytest.raises(BuildError, match=r"Permission denied.*set DWL_KERNELS_CACHE"):
            _cache.cached("other-key", ".so", lambda: "gcc", Compiler(), "a kernel")


@root_only
@pytest.mark.parametrize("get", [Compiler().get, without_compiler])
def test_folder_that_only_root_can_read_says_so(public: Path, get: Callable[[], Path]) -> None:
    Compiler().get()
    with user(OTHER), pytest.raises(BuildError, match=r"cannot be used.*Permission denied"):
        get()


@root_only
def test_folder_of_a_user_is_refused_by_root_and_by_a_third(public: Path) -> None:
    public.chmod(0o1777)
    with user(OTHER):
        library = Compiler().get()
        assert library.stat().st_uid == OTHER
        assert Compiler().get() == library
    with pytest.raises(BuildError, match=rf"belongs to user {OTHER}.* runs as user 0"):
        Compiler().get()
    with user(OTHER + 1), pytest.raises(BuildError, match=rf"runs as user {OTHER + 1}"):
        Compiler().get()


# Where it cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", "~/cache"])
def test_user_without_a_home_is_told_of_the_variable(
    monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    def no_entry(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("DWL_KERNELS_CACHE", named)
    with pytest.raises(BuildError, match=r"no home folder.*set DWL_KERNELS_CACHE"):
        Compiler().get()


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DWL_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cache.cache_dir() == tmp_path / "dwl_kernels"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored, by the specification
    assert _cache.cache_dir() == tmp_path / ".cache" / "dwl_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _cache.cache_dir() == tmp_path / ".cache" / "dwl_kernels"
    monkeypatch.setenv("DWL_KERNELS_CACHE", "~/elsewhere")
    assert _cache.cache_dir() == tmp_path / "elsewhere"


@pytest.mark.parametrize("place", ["", "folder", "folder/folder"])
def test_file_in_place_of_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(file / place))
    with pytest.raises(BuildError, match=r"Not a directory.*a file.*set DWL_KERNELS_CACHE"):
        Compiler().get()


@root_only
def test_home_that_cannot_be_written_is_named(public: Path) -> None:
    with user(OTHER), pytest.raises(BuildError, match=rf"Permission denied: '{public}/cache'"):
        Compiler().get()
