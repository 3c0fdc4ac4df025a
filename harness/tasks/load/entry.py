"""task=load: clients that load an engine or a server, or two engines in alternation."""

from __future__ import annotations

import resource
from functools import partial

import msgspec
from rich.console import Console

from harness.config.load import LoadConfig, Transport, check_load
from harness.config.schema import RunConfig
from harness.config.yaml import to_dict
from harness.engines.pool import MakeEngine, new_engine
from harness.loggers.load import describe_batching, describe_outcomes, print_load
from harness.loggers.table import print_comparison
from harness.loggers.wandb import log_comparison, log_load
from harness.records.record import RunFolder, Status
from harness.resolve.comparison import COMPARED
from harness.resolve.compose import ConfigError, ResolvedRun
from harness.resolve.limits import check_request, check_server_limits, check_size
from harness.resolve.request import to_message
from harness.tasks.common.comparison import comparison_runs
from harness.tasks.common.lifecycle import guarded, mirror
from harness.tasks.load.arrivals import traced_requests
from harness.tasks.load.dialects import check_foreign

OWN_FILES = 100  # that the client itself may have open


def check(run: ResolvedRun) -> None:
    """Refuse a load that cannot be made.

    Raises:
        ConfigError: A key of `load` or `serve` is wrong, a request is impossible or too large for the server, or one of
            two configurations is missing.
    """
    config = run.config
    if (config.compare.a is None) != (config.compare.b is None):
        raise ConfigError("task=load compares two configurations; give compare.a=[...] and compare.b=[...], or neither")
    try:
        check_load(config.load)
        check_connections(config.load)
        if config.load.url is not None:
            check_foreign(config)
        else:
            check_requests(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.compare.a is not None and config.load.rate_share is not None:
        raise ConfigError("task=load gives a and b the same arrivals; give load.rate in place of load.rate_share")
    if config.compare.a is not None and config.load.transport is not Transport.zmq:
        raise ConfigError("task=load with a and b loads two engines, not servers; drop load.transport=http")
    if config.compare.a is not None and config.load.neighbours:
        raise ConfigError("load.neighbours and compare.a both take rounds in alternation; drop one of them")


def check_requests(config: RunConfig) -> None:
    """Refuse a load with a request that is impossible or that the server does not take.

    Raises:
        ValueError: A request is refused.
    """
    message = to_message(config.request)
    for steps in config.load.steps or [message.steps]:
        sampled = msgspec.structs.replace(message, prompts=message.prompts[:1], steps=steps)
        check_request(sampled)
        check_server_limits(sampled, config.serve)
    for side in config.load.sizes:
        check_size(side, side, config.model.size_multiple, config.model.max_pixels)
    for each in traced_requests(config.load):
        try:
            check_size(
                each.height or message.height,
                each.width or message.width,
                config.model.size_multiple,
                config.model.max_pixels,
            )
            steps = each.steps or message.steps
            check_server_limits(msgspec.structs.replace(message, prompts=[""], steps=steps), config.serve)
        except ValueError as error:
            raise ValueError(f"load.trace={config.load.trace}: line {each.line}: {error}") from error
    if config.load.at_once and (config.load.requests or 0) > config.serve.max_queue:
        raise ValueError(
            f"load.at_once sends {config.load.requests} requests, and serve.max_queue={config.serve.max_queue} of them "
            f"may wait; add serve.max_queue={config.load.requests}"
        )


def check_connections(load: LoadConfig) -> None:
    """Refuse more connections at a time than this process may have files open.

    Args:
        load: The configuration of the clients.

    Raises:
        ValueError: There are too many; the message has the command that allows them.
    """
    wanted = load.requests or 0 if load.at_once else load.clients
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if load.transport is Transport.http and wanted + OWN_FILES > allowed != resource.RLIM_INFINITY:
        raise ValueError(
            f"{wanted} requests at a time over HTTP are as many connections, and this process may have {allowed} files "
            f"open; run `ulimit -n {wanted + OWN_FILES}` first"
        )


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Load an engine, or two in alternation; every error becomes a status.

    Args:
        run: The resolved run.
        console: Console for the progress and the results.
        engines: Function that returns the engine of a single load, new or still warm from an earlier job.

    Returns:
        The status, which is on disk before anything is mirrored to a logger.

    Raises:
        RunFolderError: Another run is in the folder.
        ConfigError: One of the two runs is invalid; no folder was claimed.
    """
    if run.config.compare.a is not None:
        return execute_comparison(run, console)
    from harness.tasks.load.run import run_load, status_from_loads

    config, record = run.config, None
    folder = RunFolder.claim(run.folder, run.retry)
    with guarded(run, folder) as outcome:
        record = run_load(run, folder, console, engines)
        outcome.status = status_from_loads([record.load] if record.load else [])
    if record is not None and record.load is not None:
        mirror(partial(log_load, config.logger.wandb, record, record.load, folder.path, outcome.status))
        if config.logger.table:
            print_load(record, record.load, folder.path, console)
    return outcome.status


def execute_comparison(run: ResolvedRun, console: Console) -> Status:
    """Compare two loads; every error becomes a status.

    Args:
        run: The comparison as one run.
        console: Console for the progress and the results.

    Returns:
        The status, which is on disk before anything is mirrored to a logger.

    Raises:
        RunFolderError: Another run is in the folder.
        ConfigError: One of the two runs is invalid; no folder was claimed.
    """
    from harness.tasks.load.compare import compare_loads
    from harness.tasks.load.run import status_from_loads

    config, done = run.config, None
    pair = comparison_runs(run)
    folder = RunFolder.claim(run.folder, run.retry)
    with guarded(run, folder) as outcome:
        done = compare_loads(run, pair, folder, console)
        outcome.status = status_from_loads(done[1])
    if done is not None:
        comparison, loads = done
        mirror(partial(log_comparison, config.logger.wandb, comparison, folder.path, to_dict(config), outcome.status))
        if config.logger.table:
            print_comparison(comparison, folder.path, console)
            for name, load in zip(COMPARED, loads, strict=True):
                console.print(
                    f"{name}: {load.throughput_per_s:.2f} answers/s{describe_batching(load)}; {describe_outcomes(load)}"
                )
    return outcome.status
