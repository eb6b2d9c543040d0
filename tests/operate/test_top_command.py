"""The terminal view's numbers; that it shows a real server is tests/e2e/test_operate.py's part."""

from rich.console import Console

from mdkv_vllm.cli import main
from mdkv_vllm.operate.scrape import parse
from mdkv_vllm.operate.top import view

BEFORE = """\
vllm:prompt_tokens_total{engine="0",model_name="m"} 1000
vllm:generation_tokens_total{engine="0",model_name="m"} 100
vllm:generation_tokens_total{engine="1",model_name="m"} 0
"""
NOW = """\
vllm:prompt_tokens_total{engine="0",model_name="m"} 5000
vllm:generation_tokens_total{engine="0",model_name="m"} 150
vllm:generation_tokens_total{engine="1",model_name="m"} 70
vllm:num_requests_running{engine="0",model_name="m"} 3
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.1
mixeddim:full_bytes{engine="0",model_name="m"} 4194304
mixeddim:full_bytes{engine="1",model_name="m"} 4194304
mixeddim:kept_bytes{engine="0",model_name="m"} 2097152
mixeddim:lease_bytes{engine="0",model_name="m"} 0
mixeddim:prompts_compressed_total{engine="0",model_name="m"} 12
mixeddim:prompts_skipped_total{engine="0",model_name="m",reason="too_short"} 4
mixeddim:prompts_skipped_total{engine="1",model_name="m",reason="too_short"} 1
mixeddim:prompts_skipped_total{engine="0",model_name="m",reason="session"} 0
mixeddim:segments_compressed_total{engine="0",model_name="m",part="prompt"} 13
mixeddim:segments_compressed_total{engine="0",model_name="m",part="answer"} 7
mixeddim:segments_compressed_total{engine="1",model_name="m",part="answer"} 2
mixeddim:segments_published_total{engine="0",model_name="m"} 8
mixeddim:segments_hit_total{engine="0",model_name="m"} 21
mixeddim:segments_evicted_total{engine="0",model_name="m"} 2
mixeddim:shared_prefix_tokens_total{engine="0",model_name="m"} 12500
mixeddim:compressed_tokens_total{engine="0",format="i4",model_name="m",part="prompt"} 70
mixeddim:compressed_tokens_total{engine="0",format="i4",model_name="m",part="answer"} 5
mixeddim:compressed_tokens_total{engine="0",format="full",model_name="m",part="prompt"} 25
mixeddim:compression_seconds_sum{engine="0",model_name="m"} 3
mixeddim:compression_seconds_count{engine="0",model_name="m"} 12
mixeddim:config_info{basis="none",budget="0.25",compression="on",engine="0",formats="i4,full",\
heads="even",loss="hybrid",min_prompt_tokens="256",model_name="m",window="16"} 1
"""


def lines(status=None):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(view(parse(BEFORE, 10.0), parse(NOW, 14.0), status))
    return [line.strip() for line in captured.get().splitlines()]


def test_numbers_are_summed_over_engines_and_rates_are_per_second():
    shown = [" ".join(line.split()) for line in lines()]
    assert "requests 3 running, 0 waiting, 0 preemptions so far" in shown
    assert "tokens per second 1000.0 prompt, 30.0 generated" in shown
    assert "KV bytes 2 MiB held of 8 MiB at full size (25.0%)" in shown
    assert "prompts 12 compressed, 5 skipped (too_short 5)" in shown
    assert "segments 13 of prompts and 9 of answers compressed" in shown
    read = "shared prefixes 21 segments read of 8 published, 2 seen evicted; 12,500 prompt tokens"
    assert f"{read} not computed" in shown
    assert "compression 0.250 s on average" in shown
    assert any(line.startswith("KV cache") and line.endswith("30.0%") for line in shown)
    assert any(line.startswith("as i4") and line.endswith("75.0%") for line in shown)
    assert not any("first engine" in line for line in shown)


def test_requests_are_listed_where_the_status_is_on():
    requests = [
        {
            "request_id": "cmpl-[bold]1", "prompt_tokens": 2048, "planned_share": 0.25,
            "computed_tokens": 3100, "compressed_segments": 2,
        },
        {
            "request_id": "cmpl-2", "prompt_tokens": 40, "planned_share": 1.0,
            "computed_tokens": 41, "compressed_segments": 0,
        },
    ]  # fmt: skip
    shown = "\n".join(lines({"requests": requests}))
    assert "2 requests on the first engine" in shown
    assert "cmpl-[bold]1" in shown
    assert "2,048" in shown
    assert "3,100" in shown


def test_errors_of_use(capsys):
    assert main(["top", "--interval", "0"]) == 2
    assert "--interval is 0; allowed are numbers above 0" in capsys.readouterr().err
    assert main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 2
    assert "refused" in capsys.readouterr().err
