"""Mistakes on a sweep's command line and in a sweep's folder: one line, exit status 2."""

import pytest
from conftest import INPUTS, SHAPE, in_process

from simlab.sweep import sweeper

SMALL = [*SHAPE, *INPUTS, "device=cpu", "seeds=2"]


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nowhere", "nowhere: no sweep's folder, it has no sweep.json"),
        (".", "no sweep's folder"),
        ("broken", "not JSON"),
        ("list", "not a JSON object"),
        ("away", "leads out of the sweep's folder"),
        ("other", "not what a sweep writes"),
        ("number", "not what a sweep writes"),
        ("curve", "curve.csv: not a curve"),
        ("summary", "summary.json: not what a job writes"),
        ("linked", "leads out of the sweep's folder"),
    ],
)
def test_folders_that_are_no_sweep(tmp_path, folder, said):
    one = '{"jobs": [{"folder": FOLDER, "job": JOB, "values": {}, "overrides": []}], "swept": {}}'
    contents = dict.fromkeys(("curve", "summary", "linked"), one.replace("JOB", "0")) | {
        "broken": "{", "list": "[]", "other": '{"jobs": [1], "swept": {}}',
        "away": one.replace("JOB", "1").replace("FOLDER", '"../x"'),
        "number": one.replace("JOB", '"abc"'),
    }  # fmt: skip
    for name, text in contents.items():
        (tmp_path / name / "0").mkdir(parents=True)
        (tmp_path / name / "sweep.json").write_text(text.replace("FOLDER", '"0"'))
        (tmp_path / name / "0" / "summary.json").write_text("{}")
    (tmp_path / "curve" / "0" / "curve.csv").write_text("")
    (tmp_path / "linked" / "0" / "curve.csv").symlink_to("/etc/passwd")
    whole_curve = "curve,seed,sublayer,block,kind,mean_square\nrandom,0,0,,embedding,1.0\n"
    (tmp_path / "summary" / "0" / "curve.csv").write_text(whole_curve)
    done = in_process(folder, cwd=tmp_path, command="sweep")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=abc"], "n_jobs=abc: allowed: an integer"),
        (["--cfg", "job"], "--cfg shows one job's config"),
        (["hydra.sweep.subdir='../${hydra.job.num}'"], "leads out of the sweep's folder"),
        (["seed=range(30000000)"], "jobs or more; at most 10000"),
        (["hydra/launcher=submitit"], "allowed: basic, joblib, submitit_local, submitit_slurm"),
        (["depth=1,abc"], "depth=abc: not an integer"),
        (["norm=pre,swinrenorm"], "did you mean swin_renorm?"),
        (["dpeth=1,2"], "did you mean depth?"),
        (["device=cpu,cuda:99"], "device=cuda:99: not on this machine"),
        (["+inputs.path=nowhere,nope"], "inputs.path"),
        (["norm=glob(no_such*)"], "norm"),
    ],
)
def test_mistakes_are_one_line(tmp_path, overrides, said):
    done = in_process("-m", *SMALL, "depth=1,2", *overrides, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_ends_the_command(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr(sweeper, "plan_experiment", broken)
    with pytest.raises(RuntimeError, match="ours"):
        in_process("-m", *SMALL, "depth=1,2", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lengths", [["inputs.length=4096"], ["-m", "inputs.length=64,4096"]])
def test_too_large_a_run_is_refused(tmp_path, lengths):
    sizes = [*lengths, "engine=dense", "inputs.batch=4096", "gradients=true"]
    done = in_process(*sizes, "model=olmo2_7b", "device=cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "needs about" in done.stderr
    assert "would fit" in done.stderr
    assert list(tmp_path.iterdir()) == []
