"""task=generate: start ranks, generate, save and record."""

from harness.tasks.common.measure import check as check
from harness.tasks.common.measure import execute as execute
