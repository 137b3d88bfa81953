# cmake -D build=.. -D generator=.. -D compiler=.. -D launcher=.. -D torch=.. -D flags=.. -P run.cmake
# Installs the library of `build` into build/consumer/prefix, then configures, builds and runs the project here.
set(work ${build}/consumer)
file(REMOVE_RECURSE ${work})   # an earlier install could hide a file that is no longer installed

function(step name)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 300)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${name} failed (${result}):\n${output}")
  endif()
  if(output MATCHES "[Ww]arning")
    message(FATAL_ERROR "${name} warns:\n${output}")
  endif()
endfunction()

step(install ${CMAKE_COMMAND} --install ${build} --prefix ${work}/prefix --component library)
step(configure ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${work}/build -G ${generator}
     -D CMAKE_CXX_COMPILER=${compiler}
     -D CMAKE_CXX_COMPILER_LAUNCHER=${launcher}
     -D CMAKE_CXX_FLAGS=${flags}
     -D CMAKE_PREFIX_PATH=${work}/prefix
     -D Torch_DIR=${torch})
step(build ${CMAKE_COMMAND} --build ${work}/build)
step(consumer ${work}/build/consumer)
step(consumer_torch_first ${work}/build/consumer_torch_first)
