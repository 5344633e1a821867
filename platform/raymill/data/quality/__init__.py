"""A data set looked at as a whole, before anything is trained on it.

Here: what is wrong with its rows, what their values are like, which of them come twice, and a page that shows all that.
Not here: which rows of a window are bad while a run reads them, which is `data/bad_rows`.
"""
