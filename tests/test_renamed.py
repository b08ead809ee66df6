"""Old names of settings: read for one version, with a word where a person wrote them. Settings that
are no more: left out at the value that every model has, and refused at others."""

from pathlib import Path

import pytest

from r2id.config import R2idRun, RiaeRun, load_config, parse_config
from r2id.config.renamed import REMOVED, SETTINGS, VALUES, renew_config
from r2id.errors import InputError

RUN = {"run": "runs/x", "data": {"shards": "data/x"}, "train": {"steps": 5}}
OLD = {
    "kind": "attention",
    "cell": 8.0,
    "locality": False,
    "loss": "l1",
    "texture": 0.5,
    "decode_cloud": 0.25,
}
NEW = {"kind": "attention", "downsample": 8.0, "gaussian_window": False}
LOSS = {"pixel": "l1", "texture": 0.5, "decode_cloud": 0.25}


def changed(config, section="riae"):
    return getattr(config, section).model_dump(exclude_defaults=True)


def test_a_table_under_old_names_is_read_and_told(capsys):
    config = parse_config({**RUN, "stage": "riae", "riae": OLD}, where="old.toml")
    assert isinstance(config, RiaeRun)
    assert changed(config) == NEW | {"linear": False, "lapped": False, "width": 256}
    assert changed(config, "loss") == LOSS
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(OLD) - 1 and all(line.startswith("old.toml: ") for line in told)


def test_a_checkpoint_without_a_setting_has_the_kind_of_model_that_there_was_then():
    saved = {"riae": {"width": 32}, "r2id": {"width": 32, "attention": ["full"]}}
    renewed = renew_config(saved)
    assert renewed["riae"] == {"width": 32, "kind": "attention", "lapped": False}
    assert renewed["r2id"] == {"width": 32, "attention": ["full"], "conditioning": "cross"}
    second = {"riae": {"kind": "lattice"}, "r2id": {"conditioning": "context"}}
    assert renew_config(second)["riae"] == {"kind": "lattice", "lapped": False}
    later = {"riae": {"kind": "lattice", "lapped": True}, "r2id": {"conditioning": "context"}}
    assert renew_config(later) == later
    assert renew_config(saved, where="a person's.toml") == saved
    gone = {"sample": {"attention_guidance": 0.7, "steps": 20}}
    assert renew_config(gone) == {"sample": {"steps": 20}}


def test_overrides_under_old_names_win_over_tables_under_new_ones(capsys):
    config = parse_config(
        {**RUN, "stage": "riae", "riae": {"kind": "attention", "downsample": 2.0}},
        ["riae.cell=8.0", "riae.locality=false"],
    )
    assert changed(config) == NEW | {"linear": False, "lapped": False, "width": 256}
    told = capsys.readouterr().err
    assert "riae.cell" in told and "riae.locality" in told


def test_old_values_in_a_list(capsys):
    config = parse_config({**RUN, "stage": "r2id"}, ['r2id.attention=["local","full"]'])
    assert isinstance(config, R2idRun) and config.r2id.attention == ("tiled", "full")
    assert "'tiled'" in capsys.readouterr().err


def test_today_s_names_are_silent(capsys):
    parse_config({**RUN, "stage": "riae", "riae": NEW})
    parse_config({**RUN, "stage": "riae"}, ["engine.kind=local"])
    assert capsys.readouterr().err == ""


def test_stored_configs_are_renewed_silently_and_stay_as_they_are(capsys):
    stored = {**RUN, "stage": "riae", "riae": OLD}
    renewed = {**RUN, "stage": "riae", "riae": NEW | {"lapped": False}, "loss": LOSS}
    assert renew_config(stored) == renewed
    assert stored["riae"] is OLD and "cell" in OLD and capsys.readouterr().err == ""


def test_a_checkpoint_without_a_kind_is_of_the_first_design():
    first = {name: value for name, value in OLD.items() if name != "kind"}
    renewed = renew_config({**RUN, "stage": "riae", "riae": first})["riae"]
    assert renewed == NEW | {"lapped": False}
    lattice = {"kind": "lattice", "lapped": True}
    assert renew_config({**RUN, "stage": "riae", "riae": lattice})["riae"] == lattice
    with pytest.raises(InputError, match=r"'attention'.*'lattice'"):
        parse_config({**RUN, "stage": "riae", "riae": first})  # a file is of today's default


def test_one_setting_under_both_names_is_refused():
    both = {"cell": 4.0, "downsample": 4.0}
    with pytest.raises(InputError, match=r"riae\.cell .*riae\.downsample"):
        parse_config({**RUN, "stage": "riae", "riae": both})
    with pytest.raises(InputError, match=r"riae\.cell .*riae\.downsample"):
        parse_config({**RUN, "stage": "riae", "riae": dict(reversed(both.items()))})


def test_stages_of_a_pipeline_are_read_under_old_names_too(tmp_path):
    file = tmp_path / "riae.toml"
    file.write_text(
        'stage = "riae"\nrun = "x"\ndata.shards = "d"\ntrain.steps = 1\nriae.cell = 2.0'
    )
    assert changed(load_config(file, ["riae.cell=3.0"])) == {"downsample": 3.0}


def test_every_new_name_is_a_setting():
    schemas = {"riae": RiaeRun, "loss": RiaeRun, "r2id": R2idRun}
    for name in {*SETTINGS.values(), *VALUES}:
        section, _, key = name.partition(".")
        schema = schemas[section].model_fields[section].annotation
        assert key in schema.model_fields, name
    assert not set(SETTINGS) & set(SETTINGS.values())


def of_fixed():
    """A table of a run with every setting of REMOVED that a file can hold."""
    table = {**RUN, "stage": "riae", "riae": {"kind": "attention"}, "loss": {}}
    for name, value in REMOVED.items():
        section, _, key = name.partition(".")
        if value is not None:
            table[section][key] = value
    return table


def test_settings_that_are_no_more_are_left_out_with_one_word(capsys):
    table = of_fixed()
    config = parse_config(table, ["riae.tile=4"], where="old.toml")
    assert config == parse_config({**RUN, "stage": "riae", "riae": {"kind": "attention"}})
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["old.toml", "override 'riae.tile=4'"]
    assert all(f"riae.{key}" in told[0] for key in table["riae"] if key != "kind")


def test_a_checkpoint_is_read_without_them(capsys):
    table = of_fixed()
    for name, value in REMOVED.items():
        section, _, key = name.partition(".")
        table[section][key] = value
    renewed = renew_config(table)
    assert renewed["riae"] == {"kind": "attention", "lapped": False} and renewed["loss"] == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("section", "key", "value", "now"),
    [
        ("riae", "attention", "tiled", "'cloud'"),
        ("riae", "attention", "local", "'cloud'"),
        ("riae", "latent_blocks", 1, "has 0"),
        ("riae", "cell_fourier", [-1, 2], "[-3, 2]"),
        ("riae", "cell_size", True, "False"),
        ("loss", "encode_scales", [0.5, 1.0], "does without it"),
    ],
)
def test_their_other_values_are_refused(section, key, value, now):
    table = {**RUN, "stage": "riae", section: {key: value}}
    stored = Path("runs/x/checkpoints/step-00000005")
    said = []
    for refused, given, options in (
        (parse_config, (table,), {"where": "old.toml"}),
        (renew_config, (table,), {"stored_in": stored}),
        (parse_config, ({**RUN, "stage": "riae"}, [f"{section}.{key}={value}".lower()]), {}),
    ):
        with pytest.raises(InputError) as caught:
            refused(*given, **options)
        said.append(str(caught.value))
        assert f"{section}.{key} = {value!r}: " in said[-1] and now in said[-1]
        assert "\n" not in said[-1]
    assert said[0].startswith("old.toml: ") and said[0].endswith("leave it out")
    assert said[1].startswith(f"{stored}: ") and "version of r2id that trained" in said[1]
    assert said[2].startswith("override ")
