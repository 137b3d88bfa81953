// The notebook standalone-gemma3.ipynb (LLMs-from-scratch, ch05/12_gemma3, Apache-2.0) on our
// library, cell by cell. Each step of its loop computes the whole text anew; the other notebook,
// standalone_gemma3_plus_kvcache.cpp, keeps keys and values.
//
//   standalone_gemma3 [MODEL_FOLDER] [--max-new-tokens N]
//
// Without a folder it takes the base model that cmake/run.sh fetches. N is 40 where the notebook
// has 500. Exit code 1 if a value that must be the notebook's is not, 77 if the default weights are
// absent.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <chrono>
#include <functional>

#include "gemma_torch/base/device.h"
#include "gemma_torch/pretrained.h"
#include "gemma_torch/text/chat_template.h"
#include "gemma_torch/text/stream_decoder.h"
#include "generated.h"
#include "notebook.h"
#include "quick_check.h"

namespace gemma_torch::notebook {
namespace {

constexpr Shown kCell19 = {{{0.7500, 0.1060, 0.4844, 0.9414, 0.3984, -0.2324},
                            {-0.3438, -0.0549, 0.8984, -0.2402, 0.4570, 0.8242},
                            {-0.2676, -0.3281, 0.4121, 0.8711, -0.9648, 0.9844}}};

constexpr std::string_view kCell35 =
    "Large language models (LLMs) are sophisticated artificial intelligence systems that can "
    "understand, generate, and manipulate human language. They are trained on massive amounts of "
    "text "
    "data to learn patterns and relationships within language, enabling them to perform a wide "
    "range of "
    "tasks, from writing articles and answering questions to translating languages and summarizing "
    "information.";

// 1. Architecture code
void architecture_code(const std::string& folder, Marks& marks) {
  cell(4, "versions");
  fmt::print("torch version: {}\n", TORCH_VERSION);
  marks.differs(
      "the notebook ran on 2.10.0; weights and tokenizer are read without its other two packages");

  cell(6, "USE_INSTRUCT_MODEL");
  const bool instruct = load_description(folder).instruct;
  fmt::print("USE_INSTRUCT_MODEL = {}\n", instruct ? "True" : "False");
  if (instruct) {
    marks.equal(true, "True");
  } else {
    marks.differs(kBaseModel);
  }

  cell(8, "FeedForward, and the classes of cells 9 to 13");
  fmt::print("gemma_torch/model/gemma3.h\n");
}

// 2. Initialize model
void initialize_model(Marks& marks) {
  cell(15, "GEMMA3_CONFIG_270M");
  // The defaults are the 270M model's; the notebook does not round the embedding's scale.
  const Gemma3Config cfg{.round_emb_scale = false};

  cell(16, "manual_seed(123), random weights");
  at::manual_seed(123);
  auto model = Gemma3Model(cfg);

  cell(17, "model");
  const auto architecture = describe(*model);
  fmt::print("{}\n", architecture);
  marks.equal(architecture == kArchitecture, "all lines");

  cell(19, "quick check, model(torch.tensor([1, 2, 3]).unsqueeze(0))");
  quick_check(model, /*seed=*/123, kCell19, marks);

  cell(20, "parameters");
  int64_t total_params = 0;
  for (const auto& parameter : model->parameters()) {
    total_params += parameter.numel();
  }
  fmt::print("Total number of parameters: {}\n", with_commas(total_params));
  marks.equal(total_params == 435'870'336, "435,870,336");
  const auto total_params_normalized = total_params - model->tok_emb->weight.numel();  // tied
  fmt::print("Total number of unique parameters: {}\n", with_commas(total_params_normalized));
  marks.equal(total_params_normalized == 268'098'176, "268,098,176");

  cell(21, "memory of parameters and gradients");
  calc_model_memory_size(*model, cfg, marks);
}

// 4. Load pretrained weights
Pretrained load_weights(const std::string& folder, Marks& marks) {
  cell(22, "device");
  const auto device = parse_device("auto");
  fmt::print("{}\n", device.str());

  cell(24, "load_weights_into_gemma");
  fmt::print("gemma_torch/pretrained.h, load_pretrained\n");

  cell(27, "load the weights");
  auto loaded = load_pretrained(folder, {.device = device});
  loaded.model->cfg.round_emb_scale = false;
  fmt::print("{}\n", folder);
  const bool tied = loaded.model->out_head->weight.is_same(loaded.model->tok_emb->weight);
  fmt::print("{}\n", tied ? "Model uses weight tying." : "Model has a head of its own.");
  marks.equal(tied, "Model uses weight tying.");
  return loaded;
}

// 3. Load tokenizer
std::vector<int64_t> load_tokenizer(const Pretrained& loaded, Marks& marks) {
  cell(29, "GemmaTokenizer");
  fmt::print("gemma_torch/text/tokenizer.h\n");

  cell(30, "tokenizer");
  check(loaded.tokenizer.has_value(),
        "[tokenizer] expected tokenizer.model or tokenizer.json, found neither");
  fmt::print("{} pieces\n", with_commas(loaded.tokenizer->size()));

  cell(31, "the prompt, rendered, encoded and decoded");
  const auto prompt =
      render_chat({{"user", "Give me a short introduction to large language models."}},
                  /*add_generation_prompt=*/true);
  const auto input_token_ids =
      loaded.tokenizer->encode(prompt, {.add_bos = false});  // the template has it
  const auto text = python_string(loaded.tokenizer->decode(input_token_ids));
  fmt::print("{}\n", text);
  marks.equal(
      text ==
          "'<bos><start_of_turn>user\\nGive me a short introduction to large language models."
          "<end_of_turn>\\n<start_of_turn>model\\n'",
      "the rendered prompt");
  return input_token_ids;
}

// cell 34: `yield` is a callback here
void generate_text_basic_stream(Gemma3Model& model,
                                at::Tensor token_ids,
                                int64_t max_new_tokens,
                                int64_t eos_token_id,
                                const std::function<void(int64_t)>& yield) {
  model->eval();
  const at::NoGradGuard no_grad;
  for (int64_t i = 0; i < max_new_tokens; ++i) {
    const auto out = model->forward(token_ids).select(/*dim=*/1, /*index=*/-1);  // (1, V)
    const auto next_token = at::argmax(out, /*dim=*/-1, /*keepdim=*/true);       // (1, 1)
    const auto id = next_token.item<int64_t>();
    if (id == eos_token_id) {
      break;
    }
    yield(id);
    token_ids = at::cat({token_ids, next_token}, /*dim=*/1);
  }
}

// 5. Generate text
void generate_text(Pretrained& loaded,
                   const std::vector<int64_t>& input_token_ids,
                   int64_t max_new_tokens,
                   Marks& marks) {
  cell(33, "torch.compile");
  fmt::print("left out, as in the notebook\n");

  cell(35,
       "generate at most " + std::to_string(max_new_tokens) + " tokens, every step the whole text");
  const auto device = loaded.model->tok_emb->weight.device();
  const auto input_token_ids_tensor =
      at::tensor(input_token_ids, at::kLong).unsqueeze(/*dim=*/0).to(device);
  StreamDecoder decoder(*loaded.tokenizer);
  const auto show = [](const std::string& piece) {
    fmt::print("{}", piece);
    std::fflush(stdout);
  };
  Generated generated{.prompt = input_token_ids, .ids = {}};
  const auto start = std::chrono::steady_clock::now();
  generate_text_basic_stream(loaded.model,
                             input_token_ids_tensor,
                             max_new_tokens,
                             loaded.tokenizer->end_of_turn_id(),
                             [&](int64_t id) {
                               generated.ids.push_back(id);
                               show(decoder.push(id));
                             });
  show(decoder.flush() + "\n");
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  generated.seconds = seconds.count();
  generated.ended = static_cast<int64_t>(generated.ids.size()) < max_new_tokens;
  compare_text(loaded, generated, kCell35, marks);
  print_speed(generated, device);
}

void cells(const Arguments& arguments, Marks& marks) {
  architecture_code(arguments.folder, marks);
  initialize_model(marks);
  auto loaded = load_weights(arguments.folder, marks);
  const auto input_token_ids = load_tokenizer(loaded, marks);
  generate_text(loaded, input_token_ids, arguments.max_new_tokens, marks);
}

}  // namespace
}  // namespace gemma_torch::notebook

int main(int argc, char** argv) {
  return gemma_torch::notebook::run(
      argc, argv, /*max_new_tokens=*/40, gemma_torch::notebook::cells);
}
