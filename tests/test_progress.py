"""How far loading and converting are: plain lines where no bar can be drawn."""

import time

from llama_jax.progress import bytes_progress


def test_a_line_every_ten_seconds_with_the_rate(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with bytes_progress() as watch:
        for seconds in (4, 12, 15, 20, 30):
            now[0] = 100.0 + seconds
            watch("load", seconds * 10**9 // 2, 15 * 10**9)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "load: 6.00 of 15.00 GB after 12 s, 0.50 GB/s",
        "load: 15.00 of 15.00 GB after 30 s, 0.50 GB/s",
    ]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bytes_progress() as watch:
        watch("load", 10**9, 2 * 10**9)
        watch("load", 2 * 10**9, 2 * 10**9)
    shown = capsys.readouterr().err
    assert "load" in shown and "2.0/2.0 GB" in shown
