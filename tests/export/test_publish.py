"""A bundle's folder is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dflash_export import build, publish
from dflash_export.publish import check_output, new_folder
from dflash_rt import Bundle
from dflash_rt.bundle.manifest import MANIFEST_NAME
from dflash_rt.errors import OutputError
from tests.checkpoints import byte_tokenizer
from tests.marks import slow_but
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

SPEC = TargetSpec("qwen3", layers=2)
# With traces from disk, so that it is the writing that takes the time.
EXPORT = """
import sys
from dflash_export import build
from tests.traces import TraceCache
with TraceCache().shared():
    build(*sys.argv[1:4], force="force" in sys.argv)
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    make_target(root / "target", SPEC)
    make_drafter(root / "drafter", drafter_config(SPEC))
    return root / "target", root / "drafter"


def fill(folder: Path, text: str = "new") -> None:
    (folder / MANIFEST_NAME).write_text(text)


def old_bundle(path: Path) -> Path:
    path.mkdir()
    fill(path, "old")
    return path


def assert_advises(error: pytest.ExceptionInfo[OutputError], *words: str) -> None:
    text = str(error.value)
    assert "what to do:" in text
    for word in words:
        assert word in text


def test_the_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "bundle"
    with new_folder(output, force=False) as folder:
        fill(folder)
        assert not output.exists()
        assert folder.parent == output.parent, "a rename is atomic only inside one file system"
    assert [path.name for path in output.iterdir()] == [MANIFEST_NAME]
    assert os.listdir(output.parent) == ["bundle"]


def test_the_folder_has_the_users_own_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "bundle", force=False) as folder:
        fill(folder)
    assert (tmp_path / "bundle").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "bundle", force=False) as folder:
        fill(folder)
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_an_operating_system_error_is_ours_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    with pytest.raises(OutputError) as caught, new_folder(tmp_path / "bundle", force=False) as folder:
        fill(folder)
        raise OSError(code, os.strerror(code))
    assert_advises(caught, os.strerror(code), "nothing was left behind")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["bundle", "folder", "file", "dangling link"])
def test_an_existing_output_is_refused_without_force(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "bundle":
        old_bundle(output)
    elif kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("precious")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError) as caught:
        check_output(output, force=False)
    assert_advises(caught, "exists already", "--force")


@pytest.mark.parametrize("kind", ["other folder", "file", "link to a bundle"])
def test_force_replaces_bundles_only(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "other folder":
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
    elif kind == "file":
        output.write_text("precious")
    else:
        output.symlink_to(old_bundle(tmp_path / "bundle"))
    with pytest.raises(OutputError) as caught, new_folder(output, force=True):
        pytest.fail("the work must not begin")
    assert_advises(caught, "won't replace", "choose another output")
    assert os.path.lexists(output)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    output = old_bundle(tmp_path / "bundle")
    with new_folder(output, force=True) as folder:
        fill(folder)
        assert (output / MANIFEST_NAME).read_text() == "old"
    assert (output / MANIFEST_NAME).read_text() == "new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_failed_replacement_keeps_the_old_bundle(tmp_path: Path) -> None:
    output = old_bundle(tmp_path / "bundle")
    with pytest.raises(RuntimeError), new_folder(output, force=True) as folder:
        fill(folder)
        raise RuntimeError
    assert (output / MANIFEST_NAME).read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(OutputError) as caught, new_folder(output, force=False) as folder:
        fill(folder)
        old_bundle(output)
    assert_advises(caught, "exists already")
    assert (output / MANIFEST_NAME).read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_place_below_a_file_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught, new_folder(tmp_path / "file" / "bundle", force=False):
        pytest.fail("the work must not begin")
    assert_advises(caught, "can't write")


def test_abandoned_work_is_removed_and_work_in_progress_is_not(tmp_path: Path) -> None:
    abandoned = tmp_path / ".bundle.partial-abandoned"
    abandoned.mkdir()
    (abandoned / ".lock").touch()
    others = tmp_path / ".other.partial-abandoned"
    others.mkdir()
    (others / ".lock").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "bundle", force=False) as first:
        fill(first)
        with new_folder(tmp_path / "bundle", force=False) as second:
            fill(second)
            assert first.exists()
            assert not abandoned.exists()
            assert others.exists(), "it belongs to another output"
        raise RuntimeError


def test_of_two_writers_one_wins(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    ready = threading.Barrier(2)
    results: list[str] = []

    def write(text: str) -> None:
        try:
            with new_folder(output, force=False) as folder:
                fill(folder, text)
                ready.wait(10)
            results.append(text)
        except OutputError:
            results.append("refused")

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = (output / MANIFEST_NAME).read_text()
    assert sorted(results) == sorted([winner, "refused"])
    assert os.listdir(tmp_path) == ["bundle"]


def start_export(pair: tuple[Path, Path], output: Path, *flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", EXPORT, *map(str, pair), str(output), *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until ``condition()`` holds or the process ends by itself."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


# What has been written when the kill comes; from the first file to the last.
MOMENTS = {
    "at the start": lambda folder: True,
    "among the weights": lambda folder: (folder / "drafter.data").exists(),
    "among the graphs": lambda folder: (folder / "target.onnx").exists(),
    "at the manifest": lambda folder: (folder / MANIFEST_NAME).exists(),
}


@pytest.mark.parametrize("moment", slow_but(MOMENTS, "at the manifest"))
def test_a_killed_export_leaves_a_whole_bundle_or_none(
    tmp_path: Path, pair: tuple[Path, Path], moment: str
) -> None:
    output = tmp_path / "bundle"
    process = start_export(pair, output)

    def reached() -> bool:
        return any(MOMENTS[moment](folder) for folder in tmp_path.glob(".bundle.partial-*"))

    wait_for(reached, process)
    process.kill()
    process.communicate()
    if output.exists():
        Bundle.open(output, verify_files=True)
        return
    assert process.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert all(name.startswith(".bundle.partial-") for name in left)
    assert left, "the kill came before the work began: the test shows nothing"
    if moment == "at the manifest":  # the next export cleans up, and works
        build(*pair, output)
        Bundle.open(output, verify_files=True)
        assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.slow
def test_a_killed_replacement_leaves_one_whole_bundle(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    output = tmp_path / "bundle"
    build(*pair, output, name="old")
    process = start_export(pair, output, "force")

    def reached() -> bool:
        return any(MOMENTS["at the manifest"](folder) for folder in tmp_path.glob(".bundle.partial-*"))

    wait_for(reached, process)
    process.kill()
    process.communicate()
    bundle = Bundle.open(output, verify_files=True)
    assert bundle.manifest.name in ("old", "bundle")


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from pathlib import Path
from dflash_rt.errors import OutputError
try:
    {work}
except OutputError as error:
    print(error)
    sys.exit(7)
"""


def run_on_a_full_disk(work: str, size: int, *arguments: Path) -> str:
    """What ``work`` says when the operating system lets no file have more than ``size`` bytes."""
    command = [sys.executable, "-W", "ignore", "-c", FULL_DISK.format(work=work), str(size)]
    command += map(str, arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "what to do: free disk space" in done.stdout
    return done.stdout


def test_a_full_disk(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The largest file stops half-way."""
    build(*pair, tmp_path / "bundle")  # the traces are on disk from here on
    shutil.rmtree(tmp_path / "bundle")
    work = (
        "from dflash_export import build; from tests.traces import TraceCache\n"
        "    with TraceCache().shared(): build(*sys.argv[2:5])"
    )
    assert "target.data" in run_on_a_full_disk(work, 20_000, *pair, tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("made", [True, False])
def test_a_disk_that_is_full_at_the_tokenizer(tmp_path: Path, pair: tuple[Path, Path], made: bool) -> None:
    """Copied, or made by transformers from older files: ``tokenizers`` has no error of its own for it."""
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    tokenizer = byte_tokenizer()
    if made:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
        tokenizer.model.save(str(target))
        (target / "tokenizer.json").unlink()
        (target / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    else:
        tokenizer.save(str(target / "tokenizer.json"))
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    work = "from dflash_export import build; build(*sys.argv[2:5])"
    assert "File too large" in run_on_a_full_disk(work, 2000, target, pair[1], outputs / "bundle")
    assert os.listdir(outputs) == []


def test_a_disk_that_is_full_at_what_calibrated(tmp_path: Path) -> None:
    work = (
        "import torch; from dflash_export.publish import new_folder\n"
        "    from dflash_export.quantize.calibration import CALIBRATION_FILE, Calibration, LayerCalibration\n"
        "    with new_folder(Path(sys.argv[2]), force=False) as folder:\n"
        "        layer = LayerCalibration(torch.ones(1000), None, None)\n"
        "        Calibration({'layer': layer}).save(folder / CALIBRATION_FILE)"
    )
    assert "File too large" in run_on_a_full_disk(work, 2000, tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_noticed_first(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_export import build as _  # noqa: F401  (makes sure the module below is loaded)

    module = sys.modules["dflash_export.exporter"]
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module, "trace_target", lambda *args: pytest.fail("tracing takes long"))
    with pytest.raises(OutputError) as caught:
        build(*pair, tmp_path / "bundle")
    assert_advises(caught, "too full", "free disk space")
    assert os.listdir(tmp_path) == []


def test_the_manifest_is_written_last(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """So that a folder with a manifest is whole, even if it is copied while it is being written."""
    bundle = build(*pair, tmp_path / "bundle")
    written = (bundle.root / MANIFEST_NAME).stat().st_mtime_ns
    assert all((bundle.root / name).stat().st_mtime_ns <= written for name in bundle.manifest.files)
    assert json.loads((bundle.root / MANIFEST_NAME).read_text())["name"] == "bundle"


# Where a process that publishes a folder dies, and the function that it dies in.
DEATHS = {"locked": "Path.mkdir", "flushed": "publish._publish", "renamed": "publish.shutil.rmtree"}
DYING = """
import os, signal, sys
from pathlib import Path
from dflash_export import publish
function = {function}
def die(path, *args, **kwargs):
    if ".partial-" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(path, *args, **kwargs)
{function} = die
with publish.new_folder(Path(sys.argv[1]), force=len(sys.argv) > 2) as folder:
    (folder / "manifest.json").write_text("new")
"""


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moment", DEATHS)
def test_what_a_kill_leaves_is_removed_by_the_next_export(tmp_path: Path, moment: str, force: bool) -> None:
    """Also at the moments that hardly any kill hits: after the lock, before the rename, right after it."""
    output = tmp_path / "bundle"
    if force:
        old_bundle(output)
    script = DYING.format(function=DEATHS[moment])
    done = subprocess.run(
        [sys.executable, "-c", script, str(output), *(["force"] if force else [])], check=False
    )
    assert done.returncode == -signal.SIGKILL
    renamed = moment == "renamed"
    assert output.exists() == (force or renamed)
    if output.exists():
        assert (output / MANIFEST_NAME).read_text() == ("new" if renamed else "old")
    left = [name for name in os.listdir(tmp_path) if name != "bundle"]
    assert any(name.endswith(".lock") for name in left)
    assert all(name.startswith(".bundle.partial-") for name in left)
    assert len(left) == (2 if moment == "flushed" or (force and renamed) else 1)
    with new_folder(output, force=output.exists()) as folder:
        fill(folder, "last")
    assert (output / MANIFEST_NAME).read_text() == "last"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_failed_swap_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders can't be swapped in one step, and the second of two renames fails."""
    output = old_bundle(tmp_path / "bundle")
    rename = os.rename

    def fails_for_new_folders(source: Path, destination: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    monkeypatch.setattr(publish.os, "rename", fails_for_new_folders)
    with pytest.raises(OutputError), new_folder(output, force=True) as folder:
        fill(folder)
    assert (output / MANIFEST_NAME).read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_swap_that_can_not_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the two renames fails, as where the old bundle is a mount point."""
    output = old_bundle(tmp_path / "bundle")
    rename = os.rename

    def busy(source: Path, destination: Path) -> None:
        if source == output:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, destination)

    monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    monkeypatch.setattr(publish.os, "rename", busy)
    with pytest.raises(OutputError) as caught, new_folder(output, force=True) as folder:
        fill(folder)
    assert_advises(caught, os.strerror(errno.EBUSY), "nothing was left behind")
    assert (output / MANIFEST_NAME).read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: nobody can tell what is abandoned, so nothing is removed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".bundle.partial-unknown").mkdir()
    monkeypatch.setattr(publish.FileLock, "acquire", refuse)
    with new_folder(tmp_path / "bundle", force=False) as folder:
        fill(folder)
    assert sorted(os.listdir(tmp_path)) == [".bundle.partial-unknown", "bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_without_folders_that_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """As on Windows, where two folders can't be swapped in one step either."""
    opened = os.open

    def refuse_folders(path: Path, *arguments: int, **options: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **options)

    if force:
        old_bundle(tmp_path / "bundle")
    monkeypatch.setattr(os, "open", refuse_folders)
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    # There None names no library of C functions.
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda name, **_: len(name))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree would open folders
    with new_folder(tmp_path / "bundle", force=force) as folder:
        fill(folder)
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text() == "new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    script = DYING.format(function=DEATHS["flushed"])
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "[v1]*")], check=False)
    assert len(os.listdir(tmp_path)) == 2  # the folder and its lock
    with new_folder(tmp_path / "[v1]*", force=False) as folder:
        fill(folder)
    assert os.listdir(tmp_path) == ["[v1]*"]
