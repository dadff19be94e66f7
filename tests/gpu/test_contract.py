"""The contract suite once more, on a real GPU and its own driver."""

from __future__ import annotations

import pytest

from tests.contracts.test_memory_contract import *  # noqa: F403
from tests.contracts.test_memory_deaths import *  # noqa: F403
from tests.contracts.test_memory_handles import *  # noqa: F403
from tests.contracts.test_memory_leaks import *  # noqa: F403

pytestmark = pytest.mark.gpu
