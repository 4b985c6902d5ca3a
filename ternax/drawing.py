"""matplotlib where it is installed; everything works without."""

MISSING = "a plot needs matplotlib: pip install 'ternax[plots]'"


def pyplot():
    """matplotlib.pyplot drawing into files, or None."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def said(picture) -> str:
    """What stands behind "wrote results.json": the picture, or why there is none."""
    return f" and {picture}" if picture else f"; {MISSING}"
