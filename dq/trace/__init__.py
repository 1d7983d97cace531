"""From a running pipeline to data on disk: capture calls, find units, replay them, observe what their layers see."""
