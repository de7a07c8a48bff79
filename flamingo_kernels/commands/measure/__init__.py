"""What several commands measure with.

timing    the clocks: interleaved, medians and percentiles
memory    the peak of a call
busy      whether others use the machine
progress  a line on stderr
text      numbers, dtypes, proofs and errors as a report shows them
figure    pictures
"""
