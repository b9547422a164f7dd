"""From the tables of panels to Grafana's JSON, by Grafana's own SDK."""

import json
from itertools import count
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common as parts
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana.panels import Dashboard, Panel, Variable

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="prometheus")
LEGEND = parts.VizLegendOptions().show_legend(True)
TAG = "vllm-fleet"
HEIGHTS = {"stat": 4, "state-timeline": 5, "timeseries": 7, "table": 8}

Builder = timeseries.Panel | stat.Panel | statetimeline.Panel | table.Panel


def look(panel: Panel) -> Builder:
    """The panel's kind with its look, where that differs from the SDK's defaults."""
    if panel.kind == "stat":
        last = parts.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
        # in large type: that nobody asks is well, and that nobody answers Prometheus is not
        return stat.Panel().reduce_options(last).no_value("no traffic" if panel.empty else "no data")
    if panel.kind == "state-timeline":
        words = {
            str(code): dashboard.ValueMappingResult(text=word, color=color, index=code)
            for code, (word, color) in enumerate(panel.words.items(), start=1)
        }
        return statetimeline.Panel().mappings([dashboard.ValueMap(options=words)]).legend(LEGEND)
    if panel.kind == "table":
        return columns(panel)
    stacking = common.StackingMode.NORMAL if panel.stacked else common.StackingMode.NONE
    built = (
        timeseries.Panel()
        .color_scheme(grafana.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
        .fill_opacity(30 if panel.stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .stacking(parts.StackingConfig().mode(stacking).group("A"))
        .legend(LEGEND)
        .tooltip(parts.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    )
    if panel.warn is not None or panel.alarm is not None:
        line = common.GraphThresholdsStyleMode.DASHED
        built.thresholds_style(parts.GraphThresholdsStyleConfig().mode(line))
    if panel.days:
        built.draw_style(common.GraphDrawStyle.BARS).fill_opacity(80).interval("1d").time_from(f"{panel.days}d")
    return built


def columns(panel: Panel) -> table.Panel:
    """A table: a row for each set of labels, a column for each query."""
    names = {f"Value #{letter}": query.legend for letter, query in zip(ascii_uppercase, panel.queries, strict=False)}
    order = {name: place for place, name in enumerate([*panel.labels, *names])}
    organize = {"excludeByName": {"Time": True}, "renameByName": names, "indexByName": order}
    sort = parts.TableSortByFieldState().display_name(panel.queries[0].legend).desc(True)
    return (
        table.Panel()
        .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=organize))
        .sort_by([sort])
    )


def panel_builder(panel: Panel, number: int) -> Builder:
    """The panel as the SDK builds it; `number` is its id."""
    steps = [dashboard.Threshold(None, "green")]
    steps += [
        dashboard.Threshold(at, color) for at, color in ((panel.warn, "orange"), (panel.alarm, "red")) if at is not None
    ]
    built = (
        look(panel)
        .id(number)
        .title(panel.title)
        .description(panel.description)
        .datasource(DATASOURCE)
        .span(panel.width)
        .height(panel.height or HEIGHTS[panel.kind])
        .unit(panel.unit)
        .min(0)
        .thresholds(grafana.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
    )
    if panel.ceiling is not None:
        built.max(panel.ceiling)
    if panel.decimals is not None:
        built.decimals(panel.decimals)
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        target = Dataquery().ref_id(letter).datasource(DATASOURCE).expr(query.expr).legend_format(query.legend)
        built.with_target(target.instant().format(PromQueryFormat.TABLE) if panel.kind == "table" else target.range())
    return built


def drop_down(variable: Variable) -> grafana.QueryVariable:
    """A drop-down; All matches also what comes later."""
    return (
        grafana.QueryVariable(variable.name)
        .label(variable.title)
        .datasource(DATASOURCE)
        .definition(variable.query)
        .query({"query": variable.query, "refId": variable.name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def rendered(what: Dashboard) -> str:
    """The dashboard's JSON in Grafana's own form. The SDK lays the panels out row by row."""
    # the others, with the same time and the same choices
    others = grafana.DashboardLink("Dashboards").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG])
    built = (
        grafana.Dashboard(what.title)
        .uid(what.uid)
        .description(what.description)
        .tags([TAG])
        .link(others.include_vars(True).keep_time(True))
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("10s" if what.span.endswith("m") else "1m")
        .time(f"now-{what.span}", "now")
        .timezone(common.TimeZoneBrowser)
    )
    for variable in what.variables:
        built.with_variable(drop_down(variable))
    ids = count(1)
    for title, panels in what.sections.items():
        built.with_row(grafana.Row(title).id(next(ids)))
        for panel in panels:
            built.with_panel(panel_builder(panel, next(ids)))
    return json.dumps(built.build(), cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"
