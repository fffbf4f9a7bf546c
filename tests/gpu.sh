#!/usr/bin/env bash
# What is to be checked on a GPU: `tests/gpu.sh LOGS PHOTOS`. Each part writes a log into the folder LOGS, and none
# stops the next; LOGS/summary.txt lists the exit codes. Training is on the folder PHOTOS, for a few steps, with Ctrl-C
# in both phases (exit code 130) and the same command again. In the environment: the PARTS to run, a LIMIT of seconds
# for each, the STEPS of a phase, VGG_WEIGHTS (Keras's file; downloaded if not given), and further flags: TRAIN's,
# BENCHMARK's and TEST's.
set -u
logs=$(mkdir -p "${1:?a folder for logs}" && cd "$1" && pwd) && photos=$(cd "${2:?a folder of photos}" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
run=$logs/run steps=${STEPS:-400}
limited=(timeout --foreground -k 60 "${LIMIT:-280}" python3)
upscale=("${limited[@]}" main.py --pretrained --input input.jpg)
train=(env --default-signal=INT "${limited[@]}" main.py --recipe release --data_dir "$photos" --cache_dir "$logs/cache"
  --run_dir "$run" --PREGENSTEPS "$steps" --STEPS "$steps" --finish "$steps" --save_every 20 --BATCH_SIZE 16
  --precision bfloat16 ${VGG_WEIGHTS:+--vgg_weights "$VGG_WEIGHTS"} ${TRAIN:-})

part() { # part NAME COMMAND...
  local name=$1 start=$SECONDS code
  [[ " ${PARTS:-benchmark upscale train tests} " == *" ${name%%-*} "* ]] || return
  "${@:2}" >"$logs/$name.log" 2>&1 </dev/null
  code=$?
  printf '%-17s exit code %3d, %3d s\n' "$name" $code $((SECONDS - start)) | tee -a "$logs/summary.txt"
}

interrupt() { # interrupt PHASE: Ctrl-C after its first checkpoint
  "${train[@]}" &
  until compgen -G "$run/checkpoints/$1/*.index" || ! kill -0 $!; do sleep 1; done
  kill -INT $!
  wait $!
}

part benchmark "${limited[@]}" tests/benchmark.py ${BENCHMARK:-}
part upscale-float32 "${upscale[@]}" --output "$logs/float32.jpg"
part upscale-bfloat16 "${upscale[@]}" --output "$logs/bfloat16.jpg" --precision bfloat16
part train-pretrain interrupt pretrain
part train-gan interrupt gan
part train-finish "${train[@]}"
part train-upscale "${upscale[@]}" --output "$logs/trained.jpg" --weights "$run/srgan.weights.h5"
part tests "${limited[@]}" -m pytest -q $(python3 -c 'import xdist' 2>/dev/null && printf %s -n8) ${TEST:-}
