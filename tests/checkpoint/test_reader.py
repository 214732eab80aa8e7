"""Reading tiles: flat memory, many files, many threads, and files that end early."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from irq_convert.checkpoint.buffers import dtype_name, tensor_bytes, torch_dtype
from irq_convert.checkpoint.header import DTYPE_BITS, read_header
from irq_convert.checkpoint.reader import TileReader, matrix_shape
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError
from tests.folders import assert_one_line
from tests.paths import ABSENT, SHARED

from .helpers import entry, raw_file, run_python


def test_matrix_shapes(tmp_path: Path) -> None:
    shapes = {(): (1, 1), (5,): (1, 5), (2, 3): (2, 3), (2, 3, 4): (2, 12), (0, 4): (0, 4)}
    for shape, want in shapes.items():
        size = int(np.prod(shape))
        path = raw_file(tmp_path / "x", {"t": entry("U8", list(shape), 0, size)}, bytes(size))
        assert matrix_shape(read_header(path).tensors["t"]) == want


def test_dtype_names_are_symmetric(tmp_path: Path) -> None:
    for name in DTYPE_BITS:
        if name.startswith("F6_"):
            with pytest.raises(IrqError, match=name):
                torch_dtype(name)
        else:
            assert dtype_name(torch_dtype(name)) == name
    with pytest.raises(IrqError, match="qint8"):
        dtype_name(torch.qint8)


def test_four_bit_floats_agree_with_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4).view(torch.float4_e2m1fn_x2)
    save_file({"t": tensor}, path)
    info = read_header(path).tensors["t"]
    assert info.shape == (2, 3, 8)
    with TileReader() as reader:
        got, want = reader.read_tensor(info), load_file(path)["t"]
        assert got.shape == want.shape
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        row = reader.read_rows(info, 1, 2)
        assert torch.equal(row.view(torch.uint8), want.view(torch.uint8)[1].reshape(1, 12))


def test_what_torch_cannot_hold_is_copied_as_bytes(tmp_path: Path) -> None:
    header = {"six": entry("F6_E2M3", [4], 0, 3), "odd": entry("F4", [2, 2, 1], 3, 5)}
    path = raw_file(tmp_path / "x", header, b"abcde")
    with TileReader() as reader:
        tensors = read_header(path).tensors
        for info, want in ((tensors["six"], b"abc"), (tensors["odd"], b"de")):
            with pytest.raises(IrqError) as caught:
                reader.read_tensor(info)
            assert_one_line(str(caught.value), "copied")
            assert b"".join(bytes(piece) for piece in reader.iter_bytes(info)) == want


def test_wrong_requests(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x", {"t": entry("F32", [4, 2], 0, 32)}, bytes(32))
    info = read_header(path).tensors["t"]
    with TileReader() as reader:
        for start, stop in ((-1, 2), (3, 2), (0, 5)):
            with pytest.raises(ValueError, match="4 rows"):
                reader.read_rows(info, start, stop)
        for out in (torch.empty(3, 2), torch.empty(2, 2, dtype=torch.float16)):
            with pytest.raises(ValueError, match="out must be"):
                reader.read_rows(info, 0, 2, out)
        with pytest.raises(ValueError, match="contiguous"):
            reader.read_rows(info, 0, 2, torch.empty(2, 2).T)
        with pytest.raises(ValueError, match="chunk"):
            next(reader.iter_bytes(info, 0))
    with pytest.raises(ValueError, match="closed"):
        reader.read_rows(info, 0, 1)
    with pytest.raises(ValueError, match="max_open"):
        TileReader(max_open=0)


def test_pieces_share_one_buffer(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x", {"t": entry("U8", [10], 0, 10)}, b"0123456789")
    with TileReader() as reader:
        pieces = reader.iter_bytes(read_header(path).tensors["t"], 4)
        first = next(pieces)
        assert bytes(first) == b"0123"
        next(pieces)
        assert bytes(first) == b"4567"
        assert bytes(next(pieces)) == b"89"


def test_a_file_that_shrinks_or_vanishes_is_named(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"t": entry("U8", [4, 100], 0, 400)}, bytes(400))
    info = read_header(path).tensors["t"]
    os.truncate(path, path.stat().st_size - 150)
    with TileReader() as reader:
        reader.read_rows(info, 0, 2)
        with pytest.raises(IrqError) as caught:
            reader.read_rows(info, 2, 4)
        assert_one_line(str(caught.value), str(path), "'t'", "150 bytes missing")
        with pytest.raises(IrqError, match="150 bytes missing"):
            list(reader.iter_bytes(info))
    path.unlink()
    with TileReader() as reader, pytest.raises(IrqError) as caught:
        reader.read_tensor(info)
    assert_one_line(str(caught.value), str(path), "'t'", "no such file")


def _many_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        save_file({f"t{number}": torch.full((16, 64), number, dtype=torch.int32)}, path)
    return paths


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts files in /proc")
def test_few_files_stay_open_and_all_are_closed(tmp_path: Path) -> None:
    def open_files() -> int:
        links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum(str(tmp_path) in str(link.readlink()) for link in links if link.is_symlink())

    infos = [i for p in _many_files(tmp_path, 12) for i in read_header(p).tensors.values()]
    with TileReader(max_open=3) as reader:
        for info in [*infos, *infos]:
            reader.read_tensor(info)
            assert open_files() <= 3
        assert open_files() == 3
    assert open_files() == 0


def test_threads_share_a_reader(tmp_path: Path) -> None:
    """Far more files than may stay open: descriptors must not be closed under a reading thread."""
    infos = [i for p in _many_files(tmp_path, 10) for i in read_header(p).tensors.values()]
    errors: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, 10, 300):
            try:
                tile = reader.read_rows(infos[number], 3, 9)
                if not bool((tile == int(number)).all()):
                    errors.append(f"{number}: wrong data")
            except Exception as error:
                errors.append(repr(error))

    with TileReader(max_open=2) as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


MODELS = SHARED / "models"


@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_real_model_agrees_with_the_reference(name: str) -> None:
    if not (MODELS / name).is_dir():
        pytest.skip(ABSENT)
    opened = open_checkpoint(MODELS / name)
    want = load_file(MODELS / name / "model.safetensors")
    assert set(opened.tensors) == set(want)
    with TileReader() as reader:
        for key, info in opened.tensors.items():
            assert torch.equal(reader.read_tensor(info), want[key])


def test_tensor_bytes() -> None:
    assert bytes(tensor_bytes(torch.tensor([1, 256], dtype=torch.int16))) == b"\x01\x00\x00\x01"
    assert bytes(tensor_bytes(torch.tensor(True))) == b"\x01"
    assert len(tensor_bytes(torch.empty(0, 3))) == 0
    tensor = torch.zeros(2, dtype=torch.uint8, requires_grad=False)
    tensor_bytes(tensor)[0] = 9
    assert tensor.tolist() == [9, 0]
    assert len(tensor_bytes(torch.zeros((), dtype=torch.int64).expand(1))) == 8
    with pytest.raises(ValueError, match="contiguous"):
        tensor_bytes(torch.zeros(3, 2).T)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "bytes"])
def test_memory_stays_flat_on_a_big_file(tmp_path: Path, how: str) -> None:
    """256 MiB are read through; the peak of the process grows by a tile, not by the file."""
    path = raw_file(tmp_path / "x", {"t": entry("F32", [16384, 4096], 0, 1 << 28)})
    os.truncate(path, path.stat().st_size + (1 << 28))
    code = (
        "import sys, pathlib, psutil, torch\n"
        "from irq_convert.checkpoint.header import read_header\n"
        "from irq_convert.checkpoint.reader import TileReader\n"
        "info = read_header(pathlib.Path(sys.argv[1])).tensors['t']\n"
        "process = psutil.Process(); peak = 0\n"
        "out = torch.ones(512, 4096)\n"
        "with TileReader() as reader:\n"
        "    base = process.memory_info().rss\n"
        "    if sys.argv[2] == 'rows':\n"
        "        for at in range(0, 16384, 512):\n"
        "            reader.read_rows(info, at, at + 512, out)\n"
        "            assert not out.any()\n"
        "            peak = max(peak, process.memory_info().rss)\n"
        "    else:\n"
        "        total = 0\n"
        "        for piece in reader.iter_bytes(info):\n"
        "            total += len(piece)\n"
        "            peak = max(peak, process.memory_info().rss)\n"
        "        assert total == 1 << 28\n"
        "print(peak - base)\n"
    )
    result = run_python(code, str(path), how)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 32 << 20
