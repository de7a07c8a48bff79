"""A Flamingo from nothing, on real pixels, in minutes: `python -m flamingo demo`.

::

    1. images and their words   -->  a vision encoder, by contrast           then frozen
    2. text, in three lessons   -->  a language model that looks things up   then frozen
    3. documents of both        -->  resampler and gated blocks between the two
    4. digits never seen        -->  accuracy by the number of shots

The digits are scikit-learn's, 1797 real ones of 8 x 8 pixels, and the text is made: words that are repeated,
pairs, and lists like "lamp is nine <EOC> river is two <EOC> lamp is nine", from which a language model learns
to look up what was said before, and facts like "Question: is nine odd? Answer: yes". The frozen model knows
these, and no digit. The new layers learn to show it an image as if it were such a word.

words      its tokenizer, and the text
digits     images, and what documents say of them
lessons    the language model's training
stages     the trainings that see images
run        all of it
findings   what is found, and whether it is enough
picture    drawn
command    what can be asked on the command line

Source: arXiv 2204.14198: sections 2.1 to 2.4, and B.1.4 for the evaluation.
"""

from flamingo.demo.command import main
from flamingo.demo.digits import load_digits

__all__ = ["load_digits", "main"]
