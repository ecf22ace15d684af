"""The Grafana dashboard, made from the table `ROWS`.

`python -m charts.monitoring.dashboard` writes it into the chart, `--check` says whether what lies there is current.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from qlora_api.schema import write_or_check

FILE = Path(__file__).resolve().parents[1] / "qlora-operator" / "files" / "dashboard.json"
PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
ALL = ".+"

#: The jobs that are chosen at the top of the dashboard.
CHOSEN = 'namespace=~"$namespace", qlorajob=~"$qlorajob"'
JOB = "{{namespace}}/{{qlorajob}}"

PANEL_KINDS = {"lines": timeseries.Panel, "bars": timeseries.Panel, "gauges": bargauge.Panel, "number": stat.Panel}


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel: lines, stacked bars, bar gauges or a number; `width` of 24 columns."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "lines"
    width: int = 8
    maximum: float | None = None


def of_job(series: str, legend: str = JOB, more: str = "") -> Query:
    """A series of the chosen jobs; where several pods tell it (a second attempt, a second replica), the highest."""
    return Query(f"max by (namespace, qlorajob) ({series}{{{CHOSEN}{more}}})", legend)


def quantile(q: float, histogram: str, by: str = "", over: str = "$__rate_interval") -> Query:
    """A quantile of a histogram, for each value of the label `by`."""
    labels = f"le, {by}" if by else "le"
    name = f"p{q * 100:.0f}" + (f" {{{{{by}}}}}" if by else "")
    return Query(f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket[{over}])))", name)


ROWS: dict[str, tuple[Panel, ...]] = {
    "Jobs": (
        Panel(
            "Jobs by phase",
            "All jobs of the installation.",
            "none",
            (Query("max by (phase) (qlora_jobs)", "{{phase}}"),),
            kind="bars",
            width=10,
        ),
        Panel(
            "Progress",
            "Share of each unfinished job's tasks that is done.",
            "percentunit",
            (of_job("qlora_job_progress_ratio"),),
            kind="gauges",
            width=8,
            maximum=1,
        ),
        Panel(
            "GPU hours by product",
            "Held by training attempts that ended in the time shown.",
            "h",
            (Query("sum by (product) (increase(qlora_gpu_seconds_total[$__range])) / 3600", "{{product}}"),),
            kind="number",
            width=6,
        ),
        Panel(
            "Attempts by outcome",
            "That ended in the time shown. What is not Succeeded stands in the jobs' status.attempts.",
            "none",
            (Query("sum by (stage, outcome) (increase(qlora_attempts_total[$__range])) > 0", "{{stage}} {{outcome}}"),),
            kind="gauges",
            width=12,
        ),
        Panel(
            "Duration of a stage",
            "Median and slowest tenth of the attempts that ended in the time shown.",
            "s",
            tuple(quantile(q, "qlora_stage_duration_seconds", "stage", "$__range") for q in (0.5, 0.9)),
            kind="gauges",
            width=12,
        ),
    ),
    "Training": (
        Panel(
            "Loss",
            "Of the training and, where a part of the data is held out, of that.",
            "none",
            (of_job("qlora_train_loss", f"{JOB} train"), of_job("qlora_eval_loss", f"{JOB} eval")),
            width=12,
        ),
        Panel(
            "Steps",
            "Done, and in all.",
            "none",
            (of_job("qlora_train_step", f"{JOB} done"), of_job("qlora_train_steps", f"{JOB} in all")),
            width=6,
        ),
        Panel("Epoch", "Passes over the data.", "none", (of_job("qlora_train_epoch"),), width=6),
        Panel(
            "Perplexity of known answers",
            "Of some golden and some canary examples, at each evaluation. The canary's rises with what is forgotten.",
            "none",
            (
                of_job("qlora_eval_perplexity", f"{JOB} golden", ', set="golden"'),
                of_job("qlora_eval_perplexity", f"{JOB} canary", ', set="canary"'),
            ),
            width=12,
        ),
        Panel(
            "Score of answers",
            "Of some golden examples, at each evaluation, by the metric that the best adapter is chosen by.",
            "percentunit",
            (of_job("qlora_eval_score"),),
            width=12,
            maximum=1,
        ),
        Panel("Learning rate", "Rises with the warm-up, then falls.", "sci", (of_job("qlora_learning_rate"),)),
        Panel("Gradient norm", "Before clipping. Spikes come before divergence.", "none", (of_job("qlora_grad_norm"),)),
        Panel("Tokens per second", "Over all GPUs of the job.", "none", (of_job("qlora_tokens_per_second"),)),
        Panel(
            "Model FLOPs utilisation, padding",
            "The share of the GPUs' peak that learning takes, where the peak is known; pad tokens among all.",
            "percentunit",
            (of_job("qlora_mfu_ratio", f"{JOB} MFU"), of_job("qlora_padding_ratio", f"{JOB} padding")),
            width=6,
        ),
        Panel("Tokens", "Learned from, over all attempts.", "short", (of_job("qlora_tokens_total"),), width=6),
        Panel(
            "GPU memory: predicted and measured",
            "Of the fullest GPU: predicted by the plan, so far (not told on the CPU), and at the peak in the end.",
            "bytes",
            (
                of_job("qlora_vram_bytes", f"{JOB} predicted", ', kind="predicted"'),
                of_job("qlora_gpu_memory_bytes", f"{JOB} reserved, peak so far", ', kind="reserved_peak"'),
                of_job("qlora_vram_bytes", f"{JOB} measured", ', kind="measured"'),
            ),
            width=12,
        ),
        Panel(
            "GPU memory: measured over predicted",
            "What was reserved at the peak over what was planned, of jobs that have trained: above 1 the plan was too "
            "low and the headroom was drawn on.",
            "percentunit",
            (of_job("qlora_vram_measured_ratio", JOB, ""),),
            width=12,
        ),
    ),
    "Operator": (
        Panel(
            "Leaders",
            "Replicas that act: one per installation.",
            "none",
            (Query("sum(qlora_leader)", "leaders"),),
            kind="number",
            width=4,
        ),
        Panel(
            "Passes",
            "Looks at one job, per second.",
            "ops",
            (Query("sum(rate(qlora_reconcile_duration_seconds_count[$__rate_interval]))", "passes"),),
            width=10,
        ),
        Panel(
            "Duration of a pass",
            "Median and slowest hundredth.",
            "s",
            tuple(quantile(q, "qlora_reconcile_duration_seconds") for q in (0.5, 0.99)),
            width=10,
        ),
        Panel(
            "Failed passes",
            "By the API server's answer, or the exception; each is tried again, ever later.",
            "ops",
            (
                Query("sum by (reason) (rate(qlora_reconcile_errors_total[$__rate_interval]))", "{{reason}}"),
                Query("sum(rate(qlora_workqueue_retries_total[$__rate_interval]))", "retries"),
            ),
            width=12,
        ),
        Panel(
            "Queue",
            "Jobs that wait for a worker of the operator, and jobs that are backed off.",
            "none",
            (
                Query("max(qlora_workqueue_depth)", "waiting"),
                Query("max(qlora_workqueue_backing_off)", "backing off"),
            ),
            width=12,
        ),
    ),
}


def dashboard() -> str:
    """The dashboard as JSON."""
    built = (
        Dashboard("QLoRA fine-tune jobs")
        .uid("qlora-operator")
        .tags(["qlora", "fine-tuning"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(choice("namespace", "Namespace", "label_values(qlora_job_phase, namespace)"))
        .with_variable(choice("qlorajob", "Job", 'label_values(qlora_job_phase{namespace=~"$namespace"}, qlorajob)'))
    )
    number = 0
    for title, panels in ROWS.items():
        number += 1
        built = built.with_row(Row(title).id(number))
        for panel in panels:
            number += 1
            built = built.with_panel(drawn(panel).id(number))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def choice(name: str, label: str, query: str) -> QueryVariable:
    """A variable to choose any number of values of, all at first."""
    return (
        QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(PROMETHEUS)
        .multi(True)
        .include_all(True)
        .all_value(ALL)
        .current(VariableOption(selected=True, text="All", value="$__all"))
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def drawn(panel: Panel) -> timeseries.Panel | bargauge.Panel | stat.Panel:
    """The panel as Grafana knows it. Gauges and numbers show the last value, so only that is asked for."""
    over_time = panel.kind in ("lines", "bars")
    built = (
        PANEL_KINDS[panel.kind]()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(PROMETHEUS)
        .height(8)
        .span(panel.width)
    )
    if panel.maximum is not None:
        built = built.min(0).max(panel.maximum)
    if isinstance(built, timeseries.Panel):
        legend = common.VizLegendOptions().show_legend(True)
        built = built.legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
        built = built.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        if panel.kind == "bars":
            stacking = common.StackingConfig().mode(StackingMode.NORMAL)
            built = built.draw_style(GraphDrawStyle.BARS).fill_opacity(80).stacking(stacking)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        asked = Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).datasource(PROMETHEUS)
        built = built.with_target(asked.range() if over_time else asked.instant())
    return built


if __name__ == "__main__":
    sys.exit(write_or_check(FILE, dashboard(), command="python -m charts.monitoring.dashboard"))
