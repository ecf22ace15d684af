"""A training's Prometheus metrics, served by its pod for as long as the process lives.

No label says which job: the scraper adds namespace and job from the pod.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_trainer.environment import log
from qlora_trainer.scores import CANARY
from qlora_trainer.standing import Standing

#: Name, help and value. A value that is not known is no sample.
GAUGES: tuple[tuple[str, str, Callable[[Standing], float | None]], ...] = (
    ("qlora_train_loss", "Loss of the last optimizer step, mean per token that carries loss, in nats.",
     lambda now: now.loss),
    ("qlora_eval_loss", "Loss on the held-out examples, mean per token that carries loss, in nats.",
     lambda now: now.eval_loss),
    ("qlora_learning_rate", "Learning rate of the last optimizer step.", lambda now: now.learning_rate),
    ("qlora_grad_norm", "Euclidean norm of the adapter's gradient before clipping.", lambda now: now.grad_norm),
    ("qlora_train_step", "Optimizer steps done, over all attempts.", lambda now: now.step),
    ("qlora_train_steps", "Optimizer steps of the whole training.", lambda now: now.steps),
    ("qlora_train_epoch", "Passes over the training data done, over all attempts.", lambda now: now.epoch),
    ("qlora_tokens_per_second", "Tokens learned from per second, mean of the last minute's steps, padding not counted.",
     lambda now: now.tokens_per_second),
    ("qlora_padding_ratio", "Share of pad tokens in what went through the model, over all attempts, 0 to 1.",
     lambda now: now.padding),
    ("qlora_mfu_ratio", "Model FLOPs utilisation, mean of the last minute's steps, 0 to 1; absent where the device's "
     "peak is not known.", lambda now: now.mfu),
)  # fmt: skip


class Metrics(Collector):
    """The newest figures as Prometheus reads them, in a registry of their own."""

    def __init__(self) -> None:
        self._standing: Standing | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def see(self, standing: Standing) -> None:
        """Serve these figures from now on."""
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        """The metrics of the newest figures; none before the training has begun."""
        now = self._standing
        if now is None:
            return
        for name, text, value_of in GAUGES:
            if (value := value_of(now)) is not None:
                yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            "qlora_tokens", "Tokens learned from, over all attempts, padding not counted.", value=now.tokens
        )
        perplexities = GaugeMetricFamily(
            "qlora_eval_perplexity",
            "Perplexity of the expected answers of the examples looked at in each evaluation, by set.",
            labels=["set"],
        )
        scores = GaugeMetricFamily(
            "qlora_eval_score",
            "Score of the answers to the golden examples looked at in each evaluation, 0 to 1, by metric.",
            labels=["metric"],
        )
        for name, value in now.looks.items():
            of = "canary" if name.startswith(CANARY) else "golden"
            if name.removeprefix(CANARY) == "perplexity":
                perplexities.add_metric([of], value)
            else:
                scores.add_metric([name], value)
        yield from (family for family in (perplexities, scores) if family.samples)
        if now.gpu_memory_bytes:
            memory = GaugeMetricFamily(
                "qlora_gpu_memory_bytes", "GPU memory of the allocator, in bytes.", labels=["kind"]
            )
            for kind, size in now.gpu_memory_bytes.items():
                memory.add_metric([kind], size)
            yield memory

    def serve(self, port: int, host: str | None = None) -> WSGIServer | None:
        """Serve `/metrics` in the background, on all of the pod's addresses unless `host` names one.

        A port that is not to be had is a line in the log: training goes on.
        """
        host = host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            log.info("no metrics: port %d cannot be listened on (%s)", port, error.strerror or error)
            return None
        return server
