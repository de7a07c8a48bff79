"""Faults planted one at a time, to see which the tests find: `make mutate`.

The `.toml` files beside this one hold them, one file for each part of the project, in this form::

    [[file]]
    path = "flamingo/processor.py"
    tests = ["tests/flamingo/test_processor.py"]

    [[file.fault]]
    what = "the last place of a window holds no image"
    before = "place < self.window"
    after = "place < self.window - 1"

`before` stands exactly once in the file. A fault may name other `tests` than its file, `only` some of them
(an expression for pytest's -k), and say why it is `equivalent`: that no test can tell it from what was right.
In csrc, `emulate = true` compiles every CPU variant for this very processor, whatever instructions it lacks.
"""
