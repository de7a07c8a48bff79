"""`python -m flamingo_kernels.patch`: the hashes of what is installed, for `known.py`."""

from .known import KNOWN, installed

if __name__ == "__main__":
    for name, code in installed():
        print(f"{code}  {name}  {KNOWN[name].get(code, 'unknown')}")
