"""`dare plan`: does a model fit a cluster, how is it sharded, what does a step cost; no GPU needed."""

import json as json_format
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import printable
from schemas.errors import UserError

if TYPE_CHECKING:
    from embeddings.sizes import DataSizes
    from pipeline.planning.dry_run import DryRun
    from schemas.plan import PlanSettings

CLUSTERS = Path(__file__).with_name("clusters")
KNOWN = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))


def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings, e.g. sizes.items=2_000_000_000 cluster.nodes=4.",
        ),
    ] = None,
    topology: Annotated[
        str,
        typer.Option(help=f"A cluster ({KNOWN}), or its settings file."),
    ] = "laptop-cpu",
    config: Annotated[list[Path] | None, typer.Option(help="YAML file of settings; repeatable.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data set to plan for; else give sizes.items=N.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="A dry run of each combination, e.g. attention_dim=16,32 ranks=8,64.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the sharding plan, for `dare train --plan`.")] = None,
    diff: Annotated[Path | None, typer.Option(help="Tell what differs from a plan that was saved.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Measure this machine, write its settings for --topology, and end.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """Plan a model's tables on a cluster, and estimate its memory, traffic, time and cost.

    It needs to know how large the tables are: give --data DIR, or the setting sizes.items=N and the like.
    """
    if calibrate is not None:
        _calibrate(calibrate)
        return
    from pipeline.files import check_output_file, write_whole
    from pipeline.planning.sweep import NAMES

    # A dry run can take a minute: what cannot be written is better known before.
    for file in (save, html):
        if file is not None:
            check_output_file(file)
    # `--sweep a=1,2 b=3,4` is how people write it: short names among the settings belong to the sweep.
    swept = [*(sweep or []), *(text for text in overrides or [] if sweep and text.partition("=")[0] in NAMES)]
    settings, sizes = _settings(topology, config or [], [text for text in overrides or [] if text not in swept], data)

    from pipeline.planning.dry_run import dry_run
    from pipeline.planning.text import as_dict, report, sweep_lines
    from pipeline.reporting.text_table import terminal_width
    from pipeline.runs.plan_file import differences, plan_text, read_plan

    before = None if diff is None else read_plan(diff)
    points = _swept(settings, sizes, swept)
    run = dry_run(settings, sizes)
    width = terminal_width()
    print("\n".join(report(run, width)))
    result = as_dict(run) | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if points:
        print("\n".join(["", *sweep_lines(points, width)]))
        result["sweep"] = [
            point | {key: value for key, value in as_dict(at_point).items() if key != "tables"}
            for point, at_point in points
        ]
    if run.plan is not None:
        if before is not None:
            changes = differences(before, run.plan)
            print("\n".join([f"\nagainst {diff}:", *changes]) if changes else f"\nthe same as {diff}")
            result["differences"] = changes
        if save is not None:
            write_whole(save, plan_text(run.plan))
        if html is not None:
            from pipeline.planning.page import write_page

            write_page(html, run, points)
    else:
        from pipeline.planning.sweep import remedies

        # On standard error: each try is a dry run, and all of them take a while.
        print("looking for the smallest changes that fit", file=sys.stderr)
        result["remedies"] = list(remedies(run))
    if json:
        print(json_format.dumps(result))
    if run.lack is not None:
        fits = "; or ".join(result["remedies"])
        advice = f"it would fit with any one of: {fits}" if fits else "no single change that was tried makes it fit"
        raise UserError(f"the model does not fit {settings.cluster.name}: {run.lack}; {advice}")


def _settings(
    topology: str, config: list[Path], overrides: list[str], data: Path | None
) -> tuple["PlanSettings", "DataSizes"]:
    # Imported here like all below, for `dare --help` to answer at once.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from schemas.cluster import known_clusters
    from schemas.plan import PlanSettings
    from schemas.settings import load_settings

    known = known_clusters(CLUSTERS)
    file = known.get(topology, Path(topology))
    if not file.is_file():
        raise UserError(f"--topology {topology}: unknown; known are {', '.join(known)}, or name a file")
    try:
        cluster: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--topology {topology}: cannot be read: {' '.join(str(error).split())}") from None
    # The file of the cluster is a section of the settings, so that ``cluster.nodes=4`` can change it.
    settings = load_settings(PlanSettings, config, overrides, {"cluster": cluster})

    from embeddings.sizes import DataSizes
    from pipeline.planning.workload import with_load_of
    from schemas.manifest import Manifest

    if data is not None:
        if settings.sizes is not None:
            raise UserError("--data and the settings sizes.* both say the sizes; give one of them")
        manifest = Manifest.read(data)
        return with_load_of(settings, manifest), DataSizes.of(manifest, settings.stream)
    if settings.sizes is None:
        raise UserError("no sizes to plan for: give --data DIR, or sizes.items=N and the like")
    # Sizes by hand: what a manifest would say.
    sequences = settings.stream.sequences
    lengths = {name: part.length for name, part in sequences.items()} if sequences else None
    return settings, DataSizes.counted(
        items=settings.sizes.items,
        categories=settings.sizes.categories,
        lengths=lengths or {"history": settings.stream.history_length},
        behaviors=settings.sizes.behaviors,
        scenes=settings.sizes.scenes,
    )


def _swept(settings: "PlanSettings", sizes: "DataSizes", texts: list[str]) -> list[tuple[dict[str, int], "DryRun"]]:
    """The dry runs of a sweep with the values that each is of."""
    from pipeline.planning.sweep import axis, sweep

    return list(sweep(settings, sizes, [axis(text) for text in texts])) if texts else []


def _calibrate(file: Path) -> None:
    from pipeline.files import check_output_file, write_whole
    from pipeline.planning.calibration import calibrated, cluster_text

    check_output_file(file)
    cluster = calibrated()
    write_whole(file, cluster_text(cluster))
    print(f"{printable(file)}: {cluster.device_name}, {cluster.measured}")
