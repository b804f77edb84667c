"""Making quantised weights: the values that each format can hold (`grids.py`), and two ways to choose among them.

`rtn.py` rounds each weight to the nearest value. `gptq.py` corrects the weights still to come for the error made so far, by
statistics of each matrix's input (`calibration.py`); it needs a text. Both give a `Quantized`, row by row, which
`compressed_tensors.py` lays out as files have it.
"""
