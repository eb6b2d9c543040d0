"""Files of a basis and of head scores: saved, loaded, and checked against the model.

Once for the server, for calibration and for evaluation.
"""
