"""Captions of any image, by a run."""
import caption
from tests.helpers.encoders import random_image, untrained_run


def test_captions_depend_on_image_and_seed_alone(tmp_path, capsys):
    run = str(tmp_path / "run")
    untrained_run(run)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths[:2]):
        random_image(i).save(path)

    def captions(*argv: str) -> list[str]:
        assert caption.main([run, *argv]) == 0
        return capsys.readouterr().out.splitlines()
    both = captions(*paths[:2])
    assert [line.split(": ")[0] for line in both] == paths[:2]
    assert captions(paths[1]) == both[1:]                                 # without the other image
    sampling = (paths[0], "--top-p", "0.9", "--samples", "3")
    sampled = captions(*sampling)
    assert len(sampled) == len(set(sampled)) == 3
    assert captions(*sampling) == sampled
    assert captions(*sampling, "--seed", "1") != sampled


def test_an_image_that_cannot_be_used_is_named_and_the_others_get_captions(tmp_path, capsys):
    run, good, absent = (str(tmp_path / name) for name in ("run", "good.png", "absent.png"))
    untrained_run(run)
    random_image().save(good)
    assert caption.main([run, absent, good]) == 1
    output = capsys.readouterr()
    assert output.out.startswith(good) and output.err == f"error: {absent} does not exist\n"
    assert caption.main([str(tmp_path), good]) == 1
    assert "has no checkpoint" in capsys.readouterr().err
