"""Does not import."""

from __future__ import annotations

import no_such_package_anywhere

network = no_such_package_anywhere.network
