"""The request scheduler with continuous batching: images join and leave the batch between any two evaluations.

Rank 0 has a dispatcher, a thread that owns the clients' socket. The first rank of every replica runs a loop of its own.
"""

from __future__ import annotations

import zmq

from harness.parallel.collectives import Collectives
from harness.serving.control import ControlThread
from harness.serving.dispatcher import Dispatcher
from harness.serving.replica import BatchLimits, ReplicaLoop, follow_replica
from harness.serving.request_queue import RequestQueue
from harness.serving.transport import Addresses, dealer, replica_router
from harness.serving.worker import Worker


class ContinuousBatchScheduler:
    """The scheduler of one rank.

    Args:
        worker: this rank's worker.
        collectives: the collectives over this rank's replica.
        context: the ZeroMQ context of this process.
        addresses: the engine's addresses.
        limits: the bounds of the images that share a replica.
    """

    def __init__(
        self,
        worker: Worker,
        collectives: Collectives,
        context: zmq.Context[zmq.Socket[bytes]],
        addresses: Addresses,
        limits: BatchLimits,
    ) -> None:
        self.worker = worker
        self.collectives = collectives
        self._context = context
        self._addresses = addresses
        self._limits = limits

    def follow(self) -> None:
        """Run the loop of a rank other than 0, until the engine ends."""
        position = self.worker.position
        if position.rank % position.replica_size:
            follow_replica(self.worker, self.collectives)
        else:
            ReplicaLoop(self.worker, self.collectives, self._connect(), self._limits).run()

    def lead(self, request_queue: RequestQueue, control: ControlThread) -> None:
        """Run the dispatcher and the loop of rank 0's replica, until a client's Shutdown.

        Args:
            request_queue: the queue of requests.
            control: the control thread, whose state is updated.

        Raises:
            RuntimeError: the dispatcher has failed.
        """
        socket = replica_router(self._context, self._addresses.replicas)
        dispatcher = Dispatcher(request_queue, control, socket, self.worker.position.degrees[0], self._limits)
        dispatcher.start()
        try:
            ReplicaLoop(self.worker, self.collectives, self._connect(), self._limits, dispatcher.check).run()
        finally:
            dispatcher.close()

    def _connect(self) -> zmq.Socket[bytes]:
        identity = str(self.worker.position.replica).encode()
        return dealer(self._context, self._addresses.replicas, max_queued=0, identity=identity)
