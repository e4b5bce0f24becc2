"""The one way in for data: from whatever the user passed to a checked `SampleSet`.

`tables` reads files and `sources` whatever else holds rows, `columns` tells what they hold,
`values` and `labels` make tensors of them, `encoding` gives samples; `row_problems` collects what
is wrong, to be told at once.
"""
