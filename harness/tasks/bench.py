"""task=bench: generate as task=generate does, with warm-up and repeats; its traits add counted operations."""

from harness.tasks.common.measure import check as check
from harness.tasks.common.measure import execute as execute
