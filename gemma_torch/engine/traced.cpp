#include "gemma_torch/engine/traced.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/serialization/export.h>
#include <torch/csrc/jit/serialization/import.h>

#include <functional>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/engine/eager.h"

namespace gemma_torch {
namespace {

namespace jit = torch::jit;
using c10::IValue;
using Tensors = std::vector<at::Tensor>;

constexpr const char* kConfigFile = "config.json";

// "TransformerBlock" of gemma_torch::TransformerBlockImpl.
std::string class_name(const torch::nn::Module& module) {
  auto name = module.name();
  name = name.substr(name.rfind(':') + 1);  // npos + 1 is 0
  return name.ends_with("Impl") ? name.substr(0, name.size() - 4) : name;
}

// The same tree of parameters, tensor by tensor: what is traced finds them by identity.
jit::Module mirror(const torch::nn::Module& module,
                   const std::shared_ptr<jit::CompilationUnit>& unit) {
  jit::Module script(
      c10::QualifiedName("__torch__." + class_name(module)), unit, /*shouldMangle=*/true);
  script.register_attribute(
      "training", c10::BoolType::get(), false);  // eval() and freeze look for it
  for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
    script.register_parameter(parameter.key(), parameter.value(), /*is_buffer=*/false);
  }
  for (const auto& child : module.named_children()) {
    script.register_module(child.key(), mirror(*child.value(), unit));
  }
  return script;
}

void add_method(jit::Module& script,
                const std::string& name,
                const std::vector<std::string>& arguments,
                const Tensors& examples,
                const std::function<at::Tensor(const Tensors&)>& body) {
  const auto traced = [&](jit::Stack stack) -> jit::Stack {
    Tensors inputs;
    for (const auto& value : stack) {
      inputs.push_back(value.toTensor());
    }
    return {body(inputs)};
  };
  const auto no_name = [](const at::Tensor&) { return std::string(); };
  const auto graph = jit::tracer::trace(jit::Stack(examples.begin(), examples.end()),
                                        traced,
                                        no_name,
                                        /*strict=*/true,
                                        /*force_outplace=*/false,
                                        &script,
                                        arguments)
                         .first->graph;
  auto* method = script._ivalue()->compilation_unit()->create_function(
      c10::QualifiedName(*script.type()->name(), name), graph);
  script.type()->addMethod(method);
}

void check_traceable(Gemma3Model model) {
  model->for_each_linear([](torch::nn::Module&, const std::string& name, Linear& linear) {
    check(linear->weight.defined(),
          "[traced] {}: expected a weight, got packed codes, which no trace can hold. Hint: "
          "--engine fused",
          name);
  });
}

jit::Module trace(Gemma3Model model, KvCache& cache) {
  check_traceable(model);
  const torch::NoGradGuard no_grad;
  auto script = mirror(*model, std::make_shared<jit::CompilationUnit>());
  for (const auto& [name, tensor] : cache.state()) {
    script.register_buffer(name, tensor);
  }
  const auto& how = cache.options();
  const auto add_number = [&](const char* name, int64_t value) {
    script.register_attribute(name, c10::IntType::get(), value);
  };
  add_number("batch", how.batch);
  add_number("capacity", how.capacity);
  add_number("chunk", how.chunk);
  add_number("step_bytes", step_bytes(model));

  const auto hidden = [&](const Tensors& in) {
    return model->hidden(in[0], cache.place(in[1]), &cache);
  };
  const auto uncached = [&](const Tensors& in) {
    const Stored all{in[1], {}};
    return model->hidden(in[0], {in[1], {}, all, all}, nullptr);
  };
  const auto last_logits = [&](const at::Tensor& x) {
    return model->out_head(x.slice(/*dim=*/1, /*start=*/-1)).to(at::kFloat);
  };
  const auto index = at::TensorOptions(at::kLong).device(how.device);
  constexpr int64_t kTokens = 2;  // an example: no number of tokens stays in the graph
  const Tensors examples{at::zeros({how.batch, kTokens}, index), at::arange(kTokens, index)};
  const std::vector<std::string> names{"ids", "positions"};
  add_method(script, "hidden", names, examples, hidden);
  const auto x =
      at::zeros({how.batch, kTokens, model->cfg.emb_dim}, model->tok_emb->weight.options());
  add_method(script, "head", {"x"}, {x}, [&](const Tensors& in) { return model->out_head(in[0]); });
  add_method(script, "forward", names, examples, [&](const Tensors& in) {
    return last_logits(hidden(in));
  });
  add_method(script, "forward_uncached", names, examples, [&](const Tensors& in) {
    return last_logits(uncached(in));
  });
  cache.reset();  // the examples were written to it
  script.eval();
  return script;
}

// The words of a c10::Error, without its trace of calls.
std::string reason(const c10::Error& error) {
  return error.what_without_backtrace();
}

}  // namespace

struct TracedEngine::Script {
  explicit Script(jit::Module given)
      : module(std::move(given)),
        hidden(module.get_method("hidden")),
        head(module.get_method("head")) {}

  int64_t number(const char* name) const { return module.attr(name).toInt(); }

  jit::Module module;
  jit::Method hidden, head;

  static std::unique_ptr<Script> load(const std::string& path, c10::Device device);
};

std::unique_ptr<TracedEngine::Script> TracedEngine::Script::load(const std::string& path,
                                                                 c10::Device device) {
  if (path.empty()) {
    return nullptr;
  }
  try {
    auto module = jit::load(path, device);
    const bool ours = module.hasattr("step_bytes") && module.hasattr("global_positions") &&
                      module.find_method("hidden") && module.find_method("head");
    check(ours, "[traced] {}: expected a file of gemma trace, got another TorchScript file", path);
    return std::make_unique<Script>(std::move(module));
  } catch (const c10::Error& error) {
    fail("[traced] {}: expected a TorchScript file, got: {}", path, reason(error));
  }
}

TracedEngine::TracedEngine(Gemma3Model model, const EngineOptions& options)
    : TracedEngine(
          model, options, Script::load(options.traced_file, model->tok_emb->weight.device())) {}

namespace {

// What the cache must be for a script that was loaded; `options` where there is none.
EngineOptions with_shape(EngineOptions options, const jit::Module* script) {
  if (script == nullptr) {
    return options;
  }
  const auto number = [&](const char* name) { return script->attr(name).toInt(); };
  check(number("batch") == options.batch,
        "[traced] {}: expected a trace of {} rows, got {}",
        options.traced_file,
        options.batch,
        number("batch"));
  check(number("capacity") >= options.capacity,
        "[traced] {}: expected a trace of at least {} tokens, got {}. Hint: gemma trace --ctx",
        options.traced_file,
        options.capacity,
        number("capacity"));
  const auto kv = script->attr("keys_0").toTensor().scalar_type();
  check(options.kv_dtype.value_or(kv) == kv,
        "[traced] {}: expected keys and values in {}, got {}",
        options.traced_file,
        dtype_name(*options.kv_dtype),
        dtype_name(kv));
  options.capacity = number("capacity");
  options.chunk = number("chunk");
  options.kv_dtype = kv;
  return options;
}

// Puts the cache's tensors into a script in place of its own.
void connect(jit::Module& script, const KvCache& cache, const std::string& path) {
  for (const auto& [name, tensor] : cache.state()) {
    check(script.hasattr(name), "[traced] {}: expected {}, got none", path, name);
    const auto own = script.attr(name).toTensor();
    check(own.sizes() == tensor.sizes() && own.scalar_type() == tensor.scalar_type(),
          "[traced] {}: {}: expected {} {} for this model, got {} {}",
          path,
          name,
          shape_str(tensor.sizes()),
          dtype_name(tensor.scalar_type()),
          shape_str(own.sizes()),
          dtype_name(own.scalar_type()));
    script.setattr(name, tensor);
  }
}

}  // namespace

TracedEngine::TracedEngine(Gemma3Model model,
                           const EngineOptions& options,
                           std::unique_ptr<Script> loaded)
    : HiddenEngine(model->cfg,
                   cache_options(with_shape(options, loaded ? &loaded->module : nullptr),
                                 model->tok_emb->weight,
                                 /*fixed=*/true)),
      script_(std::move(loaded)),
      weights_(dtype_name(model->tok_emb->weight.scalar_type())) {
  if (script_) {
    connect(script_->module, cache_, options.traced_file);
  } else {
    script_ = std::make_unique<Script>(trace(std::move(model), cache_));
  }
}

TracedEngine::~TracedEngine() = default;

at::Tensor TracedEngine::run(const at::Tensor& ids) {
  const auto start = cache_.position(), T = ids.size(1);
  const auto positions = at::arange(start, start + T, ids.options());
  auto x = script_->hidden({ids, positions}).toTensor();
  cache_.advance(T);
  return x;
}

at::Tensor TracedEngine::head(const at::Tensor& x) {
  return script_->head({x}).toTensor();
}

EngineReport TracedEngine::report(int64_t /*depth*/) const {
  return {"traced",
          kernels_name(cache_.options().device, at::get_cpu_capability()),
          weights_,
          at::get_num_threads(),
          script_->number("step_bytes") + cache_.bytes()};  // every slot is met
}

void save_trace(Gemma3Model model,
                const EngineOptions& options,
                bool freeze,
                const std::string& config,
                const std::string& path) {
  KvCache cache(model->cfg, cache_options(options, model->tok_emb->weight, /*fixed=*/true));
  auto script = trace(model, cache);
  if (freeze) {
    std::vector<std::string> kept{
        "hidden", "head", "forward_uncached", "batch", "capacity", "chunk", "step_bytes"};
    for (const auto& [name, tensor] : cache.state()) {
      kept.push_back(name);
    }
    // Numbers stay those of the modules: nothing is folded.
    script = jit::freeze(script, kept, /*optimize_numerics=*/false);
  }
  AtomicFile file(path);
  const auto write = [&](const void* data, size_t bytes) {
    file.write(data, bytes);
    return bytes;
  };
  try {
    jit::ExportModule(script, write, {{kConfigFile, config}});
  } catch (const c10::Error& error) {
    fail("[traced] {}: {}", path, reason(error));
  }
  file.commit();
}

}  // namespace gemma_torch
