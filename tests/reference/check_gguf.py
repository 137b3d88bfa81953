"""Compares every tensor of GGUF files with what gemma_torch reads, bit for bit.

pip install gguf==0.19.0 safetensors numpy
python tests/reference/check_gguf.py --dump build/release/tests/dump_gguf FILE.gguf ...
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open


def check(path, dump):
    """Returns the numbers of equal and of different tensors of one file."""
    equal, different = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        ours = pathlib.Path(folder) / "dump.safetensors"
        subprocess.run([dump, path, ours], check=True)
        reader = GGUFReader(path)
        with safe_open(ours, "np") as tensors:
            if sorted(tensors.keys()) != sorted(tensor.name for tensor in reader.tensors):
                sys.exit(f"{path}: the dump has other tensors than the file")
            for tensor in reader.tensors:
                shape = tuple(int(size) for size in tensor.shape[::-1])
                want = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
                got = tensors.get_tensor(tensor.name)
                same = got.dtype == want.dtype == np.float32 and got.shape == want.shape
                if same and np.array_equal(got.view(np.uint32), want.view(np.uint32)):
                    equal += 1
                else:
                    different += 1
                    print(
                        f"{path}: {tensor.name} ({tensor.tensor_type.name}) differs",
                        file=sys.stderr,
                    )
    return equal, different


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dump", required=True, help="the program dump_gguf")
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    results = [check(path, args.dump) for path in args.files]
    for path, (equal, different) in zip(args.files, results):
        print(f"{path}: {equal} tensors equal, {different} different")
    equal, different = (sum(column) for column in zip(*results))
    print(f"total: {equal} tensors equal, {different} different")
    sys.exit(different != 0)


if __name__ == "__main__":
    main()
