"""Making third-party packages usable whose compiled parts do not fit the installed torch."""
