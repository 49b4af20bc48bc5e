"""The federated core on Flower 1.41: the one place that imports flwr.

A payload travels in its own canonical encoding, as one array of bytes that Flower cuts, hashes and carries without
looking inside. So both runtimes read untrusted bytes with the same decoder, with its checksums and bounds, nothing is
parsed by ``numpy.load``, and types and shapes need no second convention.

Nothing here runs code that a server sent: clients answer with the methods of their own installation, on a data set, a
client number and a device of their own configuration.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from neurocl.errors import UserError

# Read when flwr is imported: no telemetry, no look for newer versions, no installation of what an app asks for.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
os.environ.update(QUIET)

try:
    # Its transport changes from one minor version to the next.
    found = version("flwr")
except PackageNotFoundError:
    raise UserError("federations over Flower need flwr 1.41: pip install 'neurocl[flower]'") from None
if not found.startswith("1.41."):
    raise UserError(f"federations over Flower need flwr 1.41, not {found}: pip install 'neurocl[flower]'")
