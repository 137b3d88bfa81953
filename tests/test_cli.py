#!/usr/bin/env python3
"""The gemma program from outside: exit codes, one-line errors, and the fields that scripts rely on.

    python3 tests/test_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]

GEMMA is the program, WRITE_TINY_MODEL the tool that makes its model folders. Needs no real weights.
"""

import csv
import io
import itertools
import json
import math
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
GEMMA = ""
MODELS = pathlib.Path()
# Of small_vocabulary() in support/vocabularies.h.
BOS, START_OF_TURN, A, ABC = 2, 4, 269, 279
PROMPT_IDS = "2,269,270,271,272,10,11"
GENERATE_FIELDS = """prompt_ids ids text finish_reason seed time_to_first_token_ms
    prefill_tokens_per_second decode_tokens_per_second peak_memory_bytes
    engine isa device dtype quant"""
# llama-bench's own list, in its order; its readers refuse a record without one of them.
LLAMA_BENCH_FIELDS = """build_commit build_number cpu_info gpu_info backends model_filename
    model_type model_size model_n_params n_batch n_ubatch n_threads cpu_mask cpu_strict poll
    type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu no_kv_offload flash_attn devices
    tensor_split tensor_buft_overrides load_mode lazy_mode embeddings no_op_offload no_host repack
    fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts
    stddev_ts""".split()
BENCH_SAMPLES = ["samples_ns", "samples_ts"]
BENCH_FIELDS = """median_ts min_ts max_ts engine isa cached device dtype weights quant n_sequences top_k
    tokens bytes_per_token achieved_gb_s roofline_gb_s roofline_reading roofline_share roofline_exceeded
    time_to_first_token_ms peak_memory_bytes peak_device_memory_bytes logits_hash""".split()


def gemma(*arguments, text="", code=0):
    """Runs the program; its standard output. Fails on another exit code, or a long error."""
    done = subprocess.run(
        [GEMMA, *map(str, arguments)], input=text, capture_output=True, text=True, timeout=300
    )
    if done.returncode != code:
        shown = f"{arguments}: exit code {done.returncode}"
        raise AssertionError(f"{shown}\n{done.stdout}{done.stderr}")
    return done


def error(*arguments, text="", code=1):
    """The last line on standard error of a run that fails. It is the only error."""
    done = gemma(*arguments, text=text, code=code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("gemma: error: [")]
    if len(lines) != 1 or lines[0] != done.stderr.splitlines()[-1]:
        raise AssertionError(f"expected one error line, got\n{done.stderr}")
    return lines[0]


def one_object(*arguments, text="", code=0):
    """The JSON object that is all there is on standard output."""
    return json.loads(gemma(*arguments, "--json", text=text, code=code).stdout)


def model(name):
    return "-m", MODELS / name


def wait_for_lines(path, count, run):
    """Returns once the file that a running program writes has so many lines."""
    while run.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= count):
        time.sleep(0.01)


class CliTest(unittest.TestCase):
    maxDiff = None

    def fields(self, value, names):
        self.assertEqual(sorted(value), sorted(names.split()))


COMMANDS = """generate chat tokenize detokenize logits perplexity info convert quantize trace bench
    parity capture patch lens attention attribute saliency steer sae score kl surprisal embed""".split()


class Usage(CliTest):
    def test_help_lists_every_command(self):
        shown = gemma("--help").stdout
        for command in COMMANDS:
            self.assertIn(f"  {command} ", shown)

    def test_help_of_a_command_shows_defaults(self):
        shown = gemma("bench", "--help").stdout
        self.assertIn("[512]", shown.replace("=512", "[512]"))
        self.assertIn("--n-depth", shown)

    def test_version(self):
        self.assertRegex(gemma("--version").stdout, r"^gemma \d+\.\d+\.\d+\n$")

    def test_usage_errors_are_2(self):
        self.assertIn("[usage]", error(code=2))
        self.assertIn("--nonsense", error("generate", "--nonsense", code=2))
        self.assertIn("[usage]", error("generate", "-n", "many", code=2))
        self.assertIn("[usage]", error("frobnicate", code=2))
        for command in COMMANDS[1:]:
            self.assertIn("[usage]", error(command, "--nonsense", code=2))

    def test_a_missing_model_is_named(self):
        self.assertIn("/nowhere/at all", error("generate", "-m", "/nowhere/at all", "-p", "x"))
        self.assertIn("/nowhere", error("info", "-m", "/nowhere"))
        self.assertIn("/nowhere", error("tokenize", "-m", "/nowhere", "-p", "x"))

    def test_values_that_nothing_serves(self):
        run = ("generate", *model("ids"), "--ids", PROMPT_IDS)
        self.assertIn("bfloat16", error(*run, "--dtype", "float16"))
        self.assertIn("expected auto, eager, fused, traced or graph", error(*run, "--engine", "turbo"))
        self.assertIn("[traced]", error(*run, "--traced-file", "x.ts"))
        self.assertIn("[traced] /nowhere.ts", error(*run, "--engine", "traced", "--traced-file", "/nowhere.ts"))
        self.assertIn("[quant]", error(*run, "--quant", "int8"))
        self.assertIn("[device]", error(*run, "--device", "tpu"))


class Generate(CliTest):
    def run_json(self, *more):
        return one_object(
            "generate", *model("ids"), "--ids", PROMPT_IDS, "-n", 5, "--greedy", *more
        )

    def test_json(self):
        value = self.run_json()
        self.fields(value, GENERATE_FIELDS)
        self.assertEqual(value["prompt_ids"], [int(i) for i in PROMPT_IDS.split(",")])
        self.assertEqual(len(value["ids"]), 5)
        self.assertIsNone(value["text"])  # no tokenizer
        self.assertEqual(value["finish_reason"], "length")
        self.assertEqual(
            (value["engine"], value["device"], value["dtype"]), ("eager", "cpu", "float32")
        )
        self.assertGreater(value["peak_memory_bytes"], 1e6)
        self.assertEqual(value["ids"], self.run_json()["ids"])

    def test_a_seed_repeats_a_draw(self):
        run = ("generate", *model("ids"), "--ids", PROMPT_IDS, "-n", 8)
        first = one_object(*run)
        self.assertEqual(one_object(*run, "--seed", first["seed"])["ids"], first["ids"])

    def test_text(self):
        value = one_object("generate", *model("text"), "-p", "abc", "-n", 3, "--greedy")
        self.assertEqual(value["prompt_ids"], [BOS, ABC])
        self.assertIsInstance(value["text"], str)
        piped = one_object("generate", *model("text"), "-n", 3, "--greedy", text="abc")
        self.assertEqual(piped["ids"], value["ids"])

    def test_an_empty_prompt_is_bos_alone(self):
        empty = MODELS / "empty"
        empty.write_text("")
        for more in (("-p", ""), ("--prompt=",), ("-f", empty), ()):
            value = one_object("generate", *model("text"), "-n", 1, *more)
            self.assertEqual(value["prompt_ids"], [BOS], more)
            self.assertIsNone(value["decode_tokens_per_second"])  # no token but the prompt's

    def test_bad_prompts(self):
        run = ("generate", *model("ids"), "-n", 1)
        self.assertIn('got ""', error(*run, "--ids", ""))
        self.assertIn('got "x"', error(*run, "--ids", "1,x"))
        self.assertIn("got 300", error(*run, "--ids", "300"))
        self.assertIn("--ids", error(*run, "-p", "abc"))  # no tokenizer
        self.assertIn("got both", error(*run, "--ids", "2", "-p", "abc"))
        self.assertIn("[ctx]", error(*run, "--ids", PROMPT_IDS, "--ctx", "3"))
        text = ("generate", *model("text"))
        self.assertIn("got both", error(*text, "-p", "a", "-f", "/nowhere"))
        self.assertIn("/nowhere", error(*text, "-f", "/nowhere"))
        self.assertIn("at least 1", error(*text, "-p", "a", "-n", 0))

    def test_a_closed_pipe_ends_quietly(self):
        command = [GEMMA, "generate", *map(str, model("ids")), "--ids", "2", "-n", "200", "--json"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        run.stdout.close()
        self.assertEqual(run.stderr.read(), b"")
        run.stderr.close()
        self.assertEqual(run.wait(timeout=300), 0)

    @unittest.skipUnless(pathlib.Path("/dev/full").exists(), "no /dev/full here")
    def test_a_full_disk_is_an_error(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [GEMMA, "generate", *map(str, model("ids")), "--ids", "2", "-n", "1", "--json"],
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=300,
            )
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"gemma: error: [output]", done.stderr)


class Chat(CliTest):
    def chat(self, text, *more):
        return gemma("chat", *model("text"), "--seed", 1, "--verbose", *more, text=text)

    def test_a_turn_prefills_only_its_own_tokens(self):
        done = self.chat("a\nb\n\nabc\n", "-n", 3)
        turns = [line for line in done.stderr.splitlines() if line.startswith("turn ")]
        self.assertEqual(len(turns), 3)  # an empty line is no message
        position = 0
        prefilled = []
        for line in turns:
            words = line.replace(",", "").split()
            prefilled.append(int(words[2]))
            position += int(words[2]) + int(words[5]) - 1  # the last token chosen waits
            self.assertEqual(int(words[-1]), position)
        # The frame is the same and the cut reply's last token comes with each: one token more than
        # "b" would be more history; "abc" is one piece as "b" is.
        self.assertEqual(prefilled[1], prefilled[2])
        self.assertIn("was cut after 3 tokens", done.stderr)
        self.assertIn("base model", done.stderr)
        self.assertIn(f"3 turns: {sum(prefilled)} tokens prefilled, 9 new", done.stderr)

    def test_a_special_string_in_a_message_is_text(self):
        def prefilled(message):
            line = next(x for x in self.chat(message, "-n", 1).stderr.splitlines() if "turn 1" in x)
            return int(line.split()[2])

        self.assertGreater(prefilled("<end_of_turn>"), prefilled("a") + 5)

    def test_a_full_cache_is_said(self):
        done = self.chat("a\nb\n", "-n", 500, "--ctx", 64)
        self.assertIn("the cache of 64 tokens is full", done.stderr)
        self.assertIn("1 turns", done.stderr)
        done = self.chat("a" * 200 + "\nb\n", "-n", 2, "--ctx", 64)
        self.assertIn("not sent", done.stderr)
        self.assertIn("1 turns", done.stderr)  # the second one fits

    def test_a_system_text_comes_first(self):
        plain = self.chat("a\n", "-n", 1).stderr
        told = self.chat("a\n", "-n", 1, "--system", "bbbbb").stderr
        self.assertNotEqual(plain.splitlines()[1], told.splitlines()[1])

    def test_ctrl_c_ends_the_reply_and_not_the_chat(self):
        command = [GEMMA, "chat", *map(str, model("text")), "-n", "200000", "--ctx", "200064"]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        run = subprocess.Popen(command, text=True, **pipes)
        run.stdin.write("a\n")
        run.stdin.flush()
        run.stdout.read(1)  # the reply has begun
        run.send_signal(signal.SIGINT)
        _, shown = run.communicate(timeout=300)
        self.assertEqual(run.returncode, 0)
        self.assertIn("1 turns", shown)

    def test_it_needs_a_tokenizer(self):
        self.assertIn("[chat]", error("chat", *model("ids"), text="a\n"))


class Tokens(CliTest):
    def test_tokenize(self):
        value = one_object("tokenize", *model("text"), "-p", "abc<start_of_turn>")
        self.fields(value, "ids pieces")
        self.assertEqual(value["ids"], [BOS, ABC, START_OF_TURN])
        self.assertEqual(value["pieces"], ["<bos>", "abc", "<start_of_turn>"])
        value = one_object("tokenize", *model("text"), "-p", "a", "--no-bos")
        self.assertEqual(value["ids"], [A])
        value = one_object("tokenize", *model("text"), "-p", "<bos>", "--no-bos", "--text-only")
        self.assertGreater(len(value["ids"]), 1)
        self.assertEqual(gemma("tokenize", *model("text"), "-p", "abc").stdout, f"{BOS},{ABC}\n")

    def test_detokenize_undoes_it(self):
        ids = gemma("tokenize", *model("text"), "-p", "a b\u00e9c").stdout
        for given in (("--ids", ids.strip()), ("-p", ids.replace(",", " "))):
            value = one_object("detokenize", *model("text"), *given)
            self.assertEqual(value, {"text": "<bos>a b\u00e9c"})
        plain = gemma("detokenize", *model("text"), "--skip-special", text=ids).stdout
        self.assertEqual(plain, "a b\u00e9c\n")

    def test_without_a_tokenizer_pieces_and_text_are_null(self):
        value = one_object("tokenize", *model("ids"), "--ids", "2,5")
        self.assertEqual(value, {"ids": [2, 5], "pieces": None})
        self.assertEqual(one_object("detokenize", *model("ids"), "--ids", "2,5"), {"text": None})
        self.assertIn("no tokenizer", error("detokenize", *model("ids"), "--ids", "2,5"))

    def test_errors(self):
        self.assertIn("300", error("detokenize", *model("text"), "--ids", "300"))
        self.assertIn("[ids]", error("detokenize", *model("text"), "-p", ""))
        done = subprocess.run(
            [GEMMA, "tokenize", *map(str, model("text"))], input=b"a\xff", capture_output=True
        )
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"UTF-8", done.stderr)


class Logits(CliTest):
    def test_json(self):
        value = one_object("logits", *model("text"), "-p", "abc", "--top", 300)
        self.fields(value, "ids top")
        self.assertEqual(value["ids"], [BOS, ABC])
        self.assertEqual(len(value["top"]), 300)
        for row in value["top"]:
            self.fields(row, "id piece logit logprob")
        self.assertAlmostEqual(sum(math.exp(row["logprob"]) for row in value["top"]), 1, places=5)
        logits = [row["logit"] for row in value["top"]]
        self.assertEqual(logits, sorted(logits, reverse=True))
        greedy = one_object("generate", *model("text"), "-p", "abc", "-n", 1, "--greedy")
        self.assertEqual(greedy["ids"], [value["top"][0]["id"]])

    def test_plain_and_errors(self):
        shown = gemma("logits", *model("ids"), "--ids", "2", "--top", 3).stdout.splitlines()
        self.assertEqual(len(shown), 4)
        self.assertIn("--top", error("logits", *model("ids"), "--ids", "2", "--top", 0))


class Perplexity(CliTest):
    ids = ",".join(str(2 + i * 7 % 290) for i in range(37))

    def test_json(self):
        value = one_object("perplexity", *model("ids"), "--ids", self.ids, "-c", 16, "--per-token")
        self.fields(value, "tokens nll perplexity per_token")
        self.assertEqual(value["tokens"], 14)  # 7 of each of 2 windows
        self.assertAlmostEqual(value["perplexity"], math.exp(value["nll"]), places=6)
        self.assertEqual(
            [row["index"] for row in value["per_token"]], [*range(9, 16), *range(25, 32)]
        )
        mean = -sum(row["logprob"] for row in value["per_token"]) / 14
        self.assertAlmostEqual(value["nll"], mean, places=6)

    def test_a_whole_text_agrees_with_logits(self):
        run = ("perplexity", *model("ids"), "-c", 0, "--ids")
        value = one_object(*run, "2,30,40", "--per-token")
        self.assertEqual(value["tokens"], 2)
        top = one_object("logits", *model("ids"), "--ids", "2,30", "--top", 300)["top"]
        expected = next(row["logprob"] for row in top if row["id"] == 40)
        self.assertAlmostEqual(value["per_token"][1]["logprob"], expected, places=5)
        self.assertIsNone(one_object(*run, "2,3")["per_token"])

    def test_text_begins_with_bos(self):
        run = ("perplexity", *model("text"), "-c", 0, "-p")
        value = one_object(*run, "ab", "--per-token")
        self.assertEqual([row["piece"] for row in value["per_token"]], ["ab"])
        self.assertRegex(gemma(*run, "abcd").stdout, r"^perplexity \d")

    def test_too_short(self):
        self.assertIn(
            "one chunk of 512 tokens, got 37", error("perplexity", *model("ids"), "--ids", self.ids)
        )


class Info(CliTest):
    def test_json(self):
        value = one_object("info", *model("golden"))
        self.fields(
            value,
            "model instruct stop_ids sampling config parameters memory machine devices engines",
        )
        # A layer: q 32, k 8, v 8, out 32 and three times 24, each by 16; norms 4 x 16 and 2 x 8.
        layers = 4 * (16 * (32 + 8 + 8 + 32 + 3 * 24) + 4 * 16 + 2 * 8)
        unique = 101 * 16 + layers + 16
        self.assertEqual(
            value["parameters"], {"unique": unique, "with_separate_head": unique + 101 * 16}
        )
        self.assertEqual(value["memory"]["weights_bytes"], 4 * (unique + 101 * 16))  # not tied
        # two full layers of 1 group x 8, keys and values, float32
        self.assertEqual(value["memory"]["kv_cache_bytes_per_further_1024"], 1024 * 2 * 2 * 8 * 4)
        engines = {row["engine"]: row for row in value["engines"]}
        self.assertTrue(engines["eager"]["available"])
        self.assertTrue(engines["fused"]["available"])
        self.assertTrue(engines["traced"]["available"])
        self.assertTrue(value["machine"]["libtorch"])
        self.assertFalse(value["instruct"])

    def test_plain(self):
        shown = gemma("info", *model("ids")).stdout
        for word in ("parameters", "memory", "machine", "engines", "sliding_window"):
            self.assertIn(word, shown)


class Parity(CliTest):
    dump = GOLDEN / "tiny_sites.safetensors"

    def test_every_site_is_ok(self):
        shown = gemma("parity", self.dump, *model("golden")).stdout.splitlines()
        self.assertRegex(shown[0], r"^\[OK\] embed max_abs=\S+ mean_abs=\S+")
        self.assertTrue(all(line.startswith("[OK]") for line in shown[:-1]))
        value = one_object("parity", self.dump, *model("golden"))
        self.fields(value, "ok reference engine device dtype tokens sites")
        self.assertEqual(
            (value["ok"], value["reference"], value["dtype"], value["tokens"]),
            (True, "transformers", "float32", 10),
        )
        self.assertEqual(len(value["sites"]), len(shown) - 1)
        for more in (("--engine", "traced"), ("--engine", "traced", "--no-cache")):
            other = one_object("parity", self.dump, *model("golden"), *more)
            self.assertEqual([row["site"] for row in other["sites"]], ["logits"])
            self.assertTrue(other["ok"])
            self.assertLess(other["sites"][0]["max_abs"], 1e-3)
        for row in value["sites"]:
            self.fields(row, "site max_abs mean_abs max_reference tolerance ok")

    def test_without_a_dump_the_modules_in_float32_judge(self):
        ids = ("--ids", "3,4,5,6,7,8,9,10,11,12", "-n", "20", *model("ids"))
        value = one_object("parity", *ids, "--engine", "eager", "--dtype", "bfloat16")
        self.assertEqual((value["reference"], value["ok"]), ("CPU float32 eager", True))
        self.assertEqual(value["sites"][-1]["site"], "decode")
        self.assertGreater(value["sites"][-2]["max_abs"], 0)
        self.assertGreater(len(value["sites"]), 40)
        value = one_object("parity", *ids, "--engine", "traced", "--dtype", "float32")
        self.assertEqual([row["site"] for row in value["sites"]], ["logits", "decode"])
        self.assertIn("[graph] ", error("parity", *ids, "--engine", "graph", "--device", "cpu"))
        self.assertIn("got both", error("parity", self.dump, *ids))
        self.assertIn("got neither", error("parity", *model("ids")))

    def test_a_difference_fails(self):
        with tempfile.TemporaryDirectory() as folder:
            changed = pathlib.Path(folder) / "changed.safetensors"
            data = bytearray(self.dump.read_bytes())
            data[-1] ^= 0x7F  # the exponent of the last value in the file
            changed.write_bytes(data)
            done = gemma("parity", changed, *model("golden"), code=1)
            self.assertEqual(sum(x.startswith("[FAIL]") for x in done.stdout.splitlines()), 1)
            self.assertIn("gemma: error: [parity] 1 of ", done.stderr)
            value = one_object("parity", changed, *model("golden"), code=1)
            self.assertFalse(value["ok"])

    def test_errors(self):
        self.assertIn("/nowhere", error("parity", "/nowhere", *model("golden")))
        self.assertIn("[parity] blocks.0.q: expected", error("parity", self.dump, *model("ids")))
        weights = MODELS / "golden" / "model.safetensors"
        self.assertIn("metadata dtype", error("parity", weights, *model("golden")))


class Bench(CliTest):
    def bench(self, *more):
        return json.loads(gemma("bench", *model("ids"), "-r", 2, "-o", "json", *more).stdout)

    def lengths(self, *more):
        records = self.bench("-r", 1, "-t", 1, *more)
        return [(r["n_depth"], r["n_prompt"], r["n_gen"]) for r in records]

    def refused(self, *more):
        return error("bench", *model("ids"), *more)

    def test_json_is_an_array_of_complete_records(self):
        records = self.bench("-p", "4", "-n", "2", "-pg", "4,2", "-t", 1, "-r", 3)
        self.assertEqual(len(records), 3)
        for record in records:
            self.assertEqual(
                [name for name in record if name != "samples_roofline_gb_s"],
                [*LLAMA_BENCH_FIELDS, *BENCH_SAMPLES, *BENCH_FIELDS, "profile"],
            )
            self.assertEqual([len(record[name]) for name in BENCH_SAMPLES], [3, 3])
            tokens = record["n_prompt"] + record["n_gen"]
            for nanoseconds, rate in zip(record["samples_ns"], record["samples_ts"]):
                self.assertAlmostEqual(rate * nanoseconds / 1e9, tokens, delta=0.01)
            rates = record["samples_ts"]
            self.assertEqual(record["median_ts"], statistics.median(rates))
            self.assertEqual((record["min_ts"], record["max_ts"]), (min(rates), max(rates)))
            self.assertAlmostEqual(record["avg_ts"] / statistics.mean(rates), 1)
            self.assertAlmostEqual(record["stddev_ts"] / statistics.stdev(rates), 1)
            self.assertGreater(record["time_to_first_token_ms"], 0)
            self.assertLessEqual(record["time_to_first_token_ms"], max(record["samples_ns"]) / 1e6)
            self.assertEqual((record["n_threads"], record["engine"]), (1, "eager"))
            self.assertGreater(record["peak_memory_bytes"], 10e6)
            self.assertIsNone(record["logits_hash"])

    def test_lists_ranges_and_pairs(self):
        pairs = ("-pg", "4,2", "-pg", "3,1")
        one_depth = [(4, 0), (8, 0), (3, 0), (0, 2), (0, 1), (4, 2), (3, 1)]
        both = [(depth, *test) for depth in (0, 5) for test in one_depth]
        self.assertEqual(self.lengths("-p", "4-8+4,3", "-n", "2,0,1", *pairs, "-d", "0,5"), both)
        short = [(0, n, 0) for n in (1, 2, 4, 8, 5, 6, 9)]
        self.assertEqual(self.lengths("-p", "1-8*2", "-p", "5-6", "-p", "9", "-n", 0), short)
        self.assertEqual(self.lengths("-p", "0", "-n", 0, "-pg", "0,2", "-pg", "0,0"), [(0, 0, 2)])

    def test_every_combination_in_the_order_of_llama_bench(self):
        flags = {
            "-b": ("n_batch", 1, 2),
            "-ub": ("n_ubatch", 3, 4),
            "-t": ("n_threads", 1, 2),
            "-d": ("n_depth", 0, 1),
            "--sequences": ("n_sequences", 1, 3),
            "--top-k": ("top_k", 1, 2),
            "-p": ("n_prompt", 2, 1),
        }
        given = [word for flag, (_, a, b) in flags.items() for word in (flag, f"{a},{b}")]
        names = [name for name, _, _ in flags.values()]
        expected = list(itertools.product(*(values for _, *values in flags.values())))
        records = self.bench("-r", 1, "-n", 0, *given)
        self.assertEqual([tuple(r[name] for name in names) for r in records], expected)

    def test_roofline(self):
        prompt, step = self.bench("-p", 4, "-n", 2, "-t", 1, "-r", 3)
        for record in (prompt, step):
            self.assertGreater(record["roofline_gb_s"], 0.1)
            self.assertRegex(
                record["roofline_reading"], r"^[124] streams?, (no prefetch|prefetch \d+)$"
            )
            self.assertFalse(record["roofline_exceeded"])  # overhead is all there is in this model
        for name in ("bytes_per_token", "achieved_gb_s", "roofline_share"):
            self.assertIsNone(prompt[name])  # reading a prompt is not bound by memory
        achieved = step["bytes_per_token"] * step["median_ts"] / 1e9
        self.assertAlmostEqual(step["achieved_gb_s"] / achieved, 1)
        shares = [
            step["bytes_per_token"] * rate / 1e9 / reading
            for rate, reading in zip(step["samples_ts"], step["samples_roofline_gb_s"], strict=True)
        ]
        self.assertAlmostEqual(step["roofline_share"] / statistics.median(shares), 1)
        # The 512 MiB that were read are another process's.
        self.assertLess(step["peak_memory_bytes"], 512 * 2**20)

    def test_grid(self):
        with tempfile.TemporaryDirectory() as folder:
            chart = pathlib.Path(folder) / "grid.svg"
            grid = ("bench", "--grid", *model("ids"), "-n", 2, "-r", 1, "-t", 1)
            records = json.loads(gemma(*grid, "-o", "json", "--svg", chart).stdout)
            bars = xml.etree.ElementTree.parse(chart).getroot()
        rows = {(r["device"], r["mode"]): r for r in records}
        self.assertEqual(len(rows), len(records))
        for device in ("cpu", "cuda", "mps"):
            for cache in ("no cache", "KV cache"):
                for how in ("", ", compiled (traced)"):
                    row = rows[device, cache + how]
                    if device == "cpu":
                        self.assertTrue(row["available"])
                        self.assertEqual(row["engine"], "traced" if how else "eager")
                        self.assertEqual((row["n_gen"], row["reason"]), (2, None))
                        self.assertEqual(row["cached"], cache == "KV cache")
                        self.assertGreater(row["peak_memory_bytes"], 0)
                    elif not row["available"]:
                        self.assertIn(f"[device] {device}", row["reason"])
        # What cannot run is a row that says why.
        self.assertIn("emb_dim 16", rows["cpu", "KV cache, compiled (fused)"]["reason"])
        self.assertIn("--small-model", rows["cpu", "fused, small"]["reason"])
        text = [element.text for element in bars.iter() if element.tag.endswith("text")]
        self.assertEqual(len(text), 1 + 2 * len(records))
        self.assertEqual(text.count("not run"), sum(not r["available"] for r in records))
        self.assertIn("/nowhere", error("bench", "--grid", "-m", "/nowhere"))
        self.assertIn("expected one number", error(*grid[:4], "-n", "1,2"))
        self.assertIn("--grid", error("bench", *model("ids"), "--svg", "x.svg"))

    def test_no_cache(self):
        ids = [
            one_object("generate", *model("ids"), "--ids", PROMPT_IDS, "-n", 5, "--greedy", *more)["ids"]
            for more in ((), ("--no-cache",), ("--engine", "traced", "--no-cache"))
        ]
        self.assertEqual(len(ids[0]), 5)
        self.assertEqual(ids[0], ids[1])
        self.assertEqual(ids[0], ids[2])

    def test_bytes_per_token(self):
        one, three = self.bench("-p", 0, "-n", 2, "-d", 20, "--sequences", "1,3", "-t", 1)
        info = one_object("info", *model("ids"))
        # every parameter once, the head being the embedding; layers see 8 and 21 tokens
        weights = 4 * info["parameters"]["unique"]
        seen = 2 * 8 * 4 * (8 + 21)
        self.assertEqual(one["bytes_per_token"], weights + seen)
        self.assertEqual(three["bytes_per_token"], weights + 3 * seen)  # of a step

    def test_sequences_count_the_tokens_of_all_rows(self):
        for record in self.bench("-p", 4, "-n", 2, "--sequences", "1,3", "-t", 1):
            tokens = (record["n_prompt"] + record["n_gen"]) * record["n_sequences"]
            for nanoseconds, rate in zip(record["samples_ns"], record["samples_ts"]):
                self.assertAlmostEqual(rate * nanoseconds / 1e9, tokens, delta=0.01)
            if record["n_gen"]:
                steps = record["median_ts"] / record["n_sequences"]
                achieved = record["bytes_per_token"] * steps / 1e9
                self.assertAlmostEqual(record["achieved_gb_s"] / achieved, 1)

    def test_the_hash_is_of_the_tokens(self):
        def hashes(*more):
            return [r["logits_hash"] for r in self.bench("--hash", "-r", 1, "-t", 1, *more)]

        run = ("-p", "4,5", "-n", "3", "-d", "0,6", "--sequences", "1,2")
        first = hashes(*run)
        self.assertEqual(len(set(first)), 12)  # another length, depth or row is another hash
        for value in first:
            self.assertRegex(value, r"^[0-9a-f]{16}$")
        self.assertEqual(hashes(*run), first)
        # However often it is run:
        self.assertEqual(hashes(*run, "-r", 3), first)

    def test_a_text_is_read_depth_first(self):
        def hashes(*more):
            records = self.bench("--hash", "-r", 2, "-t", 1, "-p", 4, "-n", 0, *more)
            self.assertEqual({r["tokens"] for r in records}, {"text" if "--ids" in more else "any"})
            return [r["logits_hash"] for r in records]

        ids = list(range(20, 29))
        given = [",".join(map(str, some)) for some in (ids, ids[::-1], [0, 1] + ids[2:], ids[:4])]
        plain, backwards, other_depth, short = (
            hashes("--ids", text, *(() if text == given[3] else ("-d", 2))) for text in given
        )
        self.assertEqual(len({*plain, *backwards, *other_depth, *short, *hashes("-d", 2)}), 5)
        # No more than is read counts.
        self.assertEqual(hashes("--ids", "20,21,22,23,24,25", "-d", 2), plain)
        self.assertIn(
            "[bench] text: expected at least 7 tokens for tg2 @ d6, got 6",
            self.refused("--ids", "20,21,22,23,24,25", "-p", 0, "-n", 2, "-d", 6),
        )
        self.assertIn("/nowhere", error("bench", *model("text"), "-f", "/nowhere"))
        self.assertIn("--grid", self.refused("--grid", "--ids", "1,2"))

    def test_a_file_is_read_as_its_tokens(self):
        run = ("bench", *model("text"), "-p", 3, "-n", 0, "-r", 1, "-t", 1, "--hash", "-o", "json")
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "text.txt"
            file.write_text("abc a abc")
            ids = gemma("tokenize", *model("text"), "-f", file).stdout.strip()
            (text,), (same,) = (
                json.loads(gemma(*run, *more).stdout) for more in (("-f", file), ("--ids", ids))
            )
        self.assertEqual(text["tokens"], "text")
        self.assertEqual(text["logits_hash"], same["logits_hash"])

    def test_csv_jsonl_and_md(self):
        once = ("bench", *model("ids"), "-r", 1, "-t", 1)
        run = (*once, "-p", "2-8*2", "-n", 0, "-o")
        lines = gemma(*run, "jsonl").stdout.splitlines()
        self.assertEqual([json.loads(line)["n_prompt"] for line in lines], [2, 4, 8])
        reader = csv.DictReader(io.StringIO(gemma(*run, "csv").stdout))
        rows = list(reader)
        self.assertEqual(reader.fieldnames, [*LLAMA_BENCH_FIELDS, *BENCH_FIELDS])
        self.assertEqual([row["n_prompt"] for row in rows], ["2", "4", "8"])
        self.assertEqual(
            {(r["cpu_strict"], r["repack"], r["bytes_per_token"], r["isa"] != "") for r in rows},
            {("0", "1", "", True)},
        )
        for row in rows:
            float(row["avg_ts"])

        def table(*arguments):
            lines = gemma(*arguments).stdout.splitlines()
            cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
            widths = [[len(cell) for cell in line.split("|")] for line in lines[:2]]
            self.assertEqual(widths[0], widths[1])
            self.assertEqual({len(row) for row in cells}, {len(cells[0])})
            return [dict(zip(cells[0], row)) for row in cells[2:]]

        rows = table(*run, "md")
        self.assertEqual([row["test"] for row in rows], ["pp2", "pp4", "pp8"])
        self.assertRegex(rows[0]["t/s"], r"^\d+\.\d\d ± 0\.00$")
        self.assertFalse({"rows", "top-k", "n_batch", "n_ubatch", "logits hash"} & set(rows[0]))
        (row,) = table(
            *(*once, "-p", 0, "-n", 2, "-d", 3, "--sequences", 2, "--top-k", 5),
            *("-b", 7, "-ub", 6, "--hash"),
        )
        self.assertEqual(row["test"], "tg2 @ d3")
        settings = (row[name] for name in ("rows", "top-k", "n_batch", "n_ubatch"))
        self.assertEqual(list(settings), ["2", "5", "7", "6"])
        self.assertRegex(row["of roofline"], r"^\d+ % of \d+\.\d$")
        self.assertRegex(row["logits hash"], r"^[0-9a-f]{16}$")

    def test_help_tells_the_defaults(self):
        shown = gemma("bench", "--help").stdout
        for default in ("n-prompt LIST=512", "n-gen LIST=128", "repetitions INT=5"):
            self.assertIn(default, shown)
        for default in ("batch-size LIST=2048", "ubatch-size LIST=512", "output TEXT=md"):
            self.assertIn(default, shown)

    def test_errors_name_the_flag_and_the_value(self):
        for flag in ("-p", "-n", "-d", "-b", "-ub", "-t", "--sequences", "--top-k"):
            self.assertIn(f"[bench] {flag}: expected numbers", self.refused(flag, "2*"))
        wrong = "a 1,,2 1, 8-4 1-4+0 1-4*1 0-4*2 1;2 1- 1-4+ 4+2 1.5".split()
        for bad in (*wrong, "9" * 20, "2147483648", ""):
            self.assertIn("[bench] -p: expected numbers", self.refused("-p", bad))
        for flag in ("-b", "-ub", "-t", "--sequences", "--top-k"):
            self.assertIn(f'{flag}: expected at least 1, got "0"', self.refused(flag, 0))
        self.assertIn("-r: expected at least 1, got 0", self.refused("-r", 0))
        self.assertIn("-p: expected at most 1000 values", self.refused("-p", "1-1001"))
        self.assertIn("-t: expected at most 1024, got 1025", self.refused("-t", "1,1025"))
        for bad in ("4", "4,", ",4", "4,2,1", "4-5", "a,b", "4,2x"):
            pair = f'-pg: expected two numbers such as 512,128, got "{bad}"'
            self.assertIn(pair, self.refused("-pg", bad))
        self.assertIn("md, json, jsonl or csv, got sql", self.refused("-o", "sql"))
        self.assertIn("expected a test", self.refused("-p", 0, "-n", 0))
        short = ("-p", 1, "-n", 4, "-d", 5, "--ctx", 8)
        self.assertIn("expected at least 9 for tg4 @ d5, got 8", self.refused(*short))
        no_profile = self.refused("--profile", "-p", 1, "--engine", "eager")
        self.assertIn("[profile] expected the fused engine, got eager", no_profile)
        self.assertIn("expected md, json or jsonl", self.refused("--profile", "-o", "csv"))


class Convert(CliTest):
    def test_a_folder_gives_the_same_model(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "out"
            gemma("convert", *model("text"), "-o", out)
            run = ("generate", "-p", "abc", "-n", 4, "--greedy")
            self.assertEqual(
                one_object(*run, "-m", out)["ids"], one_object(*run, *model("text"))["ids"]
            )
            self.assertIn("out", error("convert", *model("text"), "-o", out))  # there already


class Quantize(CliTest):
    def test_refusals(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "out"
            wrong = error("generate", *model("ids"), "--ids", "2,5", "-n", 1, "--quant", "mixed4")
            self.assertIn("gemma quantize --quant mixed4", wrong)
            wrong = error("quantize", *model("ids"), "--quant", "x", "-o", out)
            self.assertIn("one of int8, mixed6, mixed5, mixed4, got x", wrong)
            wrong = error("quantize", *model("ids"), "--quant", "int8", "-o", out)
            self.assertIn("emb_dim 16 is not a multiple of 64", wrong)
            self.assertFalse(out.exists())
            wrong = error("quantize", *model("ids"), "--quant", "int8", "-o", MODELS / "ids")
            self.assertIn("new or empty", wrong)


def main():
    global GEMMA, MODELS
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    GEMMA = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        MODELS = pathlib.Path(folder)
        subprocess.run([sys.argv[2], folder], check=True)
        ran = unittest.main(argv=[sys.argv[0], *sys.argv[3:]], exit=False)
    sys.exit(not ran.result.wasSuccessful())


if __name__ == "__main__":
    main()
