#!/usr/bin/env python3
"""The gemma program from outside: exit codes, one-line errors, and the fields that scripts rely on.

    python3 tests/test_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]

GEMMA is the program, WRITE_TINY_MODEL the tool that makes its model folders. Needs no real weights.
"""

import csv
import io
import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
GEMMA = ""
MODELS = pathlib.Path()
# Of small_vocabulary() in support/vocabularies.h.
BOS, START_OF_TURN, A, ABC = 2, 4, 269, 279
PROMPT_IDS = "2,269,270,271,272,10,11"
GENERATE_FIELDS = """prompt_ids ids text finish_reason seed time_to_first_token_ms
    prefill_tokens_per_second decode_tokens_per_second peak_memory_bytes
    engine device dtype quant"""
# Of llama-bench's records, those that say something about this program.
BENCH_FIELDS = """build_commit build_number cpu_info gpu_info backends model_filename
    model_type model_size model_n_params n_batch n_ubatch n_threads type_k type_v n_prompt n_gen
    n_depth test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts
    engine dtype device bytes_per_token achieved_gb_s roofline_gb_s time_to_first_token_ms"""


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


class CliTest(unittest.TestCase):
    maxDiff = None

    def fields(self, value, names):
        self.assertEqual(sorted(value), sorted(names.split()))


class Usage(CliTest):
    def test_help_lists_every_command(self):
        shown = gemma("--help").stdout
        for command in """generate chat tokenize detokenize logits perplexity info convert bench
                parity""".split():
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
        commands = "chat tokenize detokenize logits perplexity info convert bench parity"
        for command in commands.split():
            self.assertIn("[usage]", error(command, "--nonsense", code=2))

    def test_a_missing_model_is_named(self):
        self.assertIn("/nowhere/at all", error("generate", "-m", "/nowhere/at all", "-p", "x"))
        self.assertIn("/nowhere", error("info", "-m", "/nowhere"))
        self.assertIn("/nowhere", error("tokenize", "-m", "/nowhere", "-p", "x"))

    def test_values_that_nothing_serves(self):
        run = ("generate", *model("ids"), "--ids", PROMPT_IDS)
        self.assertIn("bfloat16", error(*run, "--dtype", "float16"))
        self.assertIn("expected auto or eager, got traced", error(*run, "--engine", "traced"))
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
            "model instruct stop_ids sampling config parameters memory machine engines",
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
        self.assertIn("not built", engines["fused"]["why_not"])
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
        self.fields(value, "ok reference dtype tokens sites")
        self.assertEqual(
            (value["ok"], value["reference"], value["dtype"], value["tokens"]),
            (True, "transformers", "float32", 10),
        )
        self.assertEqual(len(value["sites"]), len(shown) - 1)
        for row in value["sites"]:
            self.fields(row, "site max_abs mean_abs max_reference tolerance ok")

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
        return json.loads(gemma("bench", *model("ids"), "-r", 2, "-t", 1, *more).stdout)

    def test_json_is_an_array_of_complete_records(self):
        records = self.bench("-p", "4-8+4,3", "-n", "2", "-pg", "4,2", "-d", "0,5", "-o", "json")
        tests = [(r["n_depth"], r["n_prompt"], r["n_gen"]) for r in records]
        one_depth = [(4, 0), (8, 0), (3, 0), (0, 2), (4, 2)]
        self.assertEqual(tests, [(d, *test) for d in (0, 5) for test in one_depth])
        for record in records:
            self.fields(record, BENCH_FIELDS)
            self.assertEqual(len(record["samples_ns"]), 2)
            self.assertEqual(record["n_threads"], 1)
            tokens = record["n_prompt"] + record["n_gen"]
            rate = tokens * 1e9 / record["samples_ns"][0]
            self.assertAlmostEqual(record["samples_ts"][0], rate, delta=0.01 * rate)
            self.assertGreater(record["roofline_gb_s"], 0)
            self.assertGreater(record["time_to_first_token_ms"], 0)
            self.assertEqual(record["bytes_per_token"] is None, record["n_prompt"] > 0)

    def test_bytes_per_token(self):
        (record,) = self.bench("-p", 0, "-n", 2, "-d", 20, "--json")
        info = one_object("info", *model("ids"))
        # every parameter once, the head being the embedding; layers see 8 and 21 tokens
        seen = 2 * 8 * 4 * (8 + 21)
        self.assertEqual(record["bytes_per_token"], 4 * info["parameters"]["unique"] + seen)
        self.assertAlmostEqual(
            record["achieved_gb_s"], record["bytes_per_token"] * record["avg_ts"] / 1e9, places=6
        )

    def test_other_forms(self):
        run = ("bench", *model("ids"), "-r", 1, "-p", "2*", "-n", 0)
        self.assertIn("[bench] -p", error(*run))
        run = ("bench", *model("ids"), "-r", 1, "-p", "2-8*2", "-n", 0, "-o")
        lines = gemma(*run, "jsonl").stdout.splitlines()
        self.assertEqual([json.loads(line)["n_prompt"] for line in lines], [2, 4, 8])
        rows = list(csv.DictReader(io.StringIO(gemma(*run, "csv").stdout)))
        self.assertEqual([row["n_prompt"] for row in rows], ["2", "4", "8"])
        self.assertEqual(len(gemma(*run, "md").stdout.splitlines()), 2 + 3)
        self.assertIn("md, json, jsonl or csv", error(*run, "sql"))
        self.assertIn("expected a test", error("bench", *model("ids"), "-p", 0, "-n", 0))
        self.assertIn("-pg", error("bench", *model("ids"), "-pg", "4"))


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
