"""Learning of merging coefficients from calibration samples."""
