"""Wrong command lines of every command: one line that says what is wrong, exit code 2, no traceback, and no fault of ours."""

import gzip
import json
import shlex

import pytest

HUGE = "99999999999999999999999"
FILES = {
    "deep.json": "[" * 100_000,
    "long.toml": "models = " + "9" * 5000,
    "deep.toml": "a = " + "[" * 5000,
    "deep.yaml": "[" * 5000,
    "date.yaml": "a: 2024-13-45\n",
    "latin.toml": "a = 'é'".encode("latin-1"),
    "preset.toml": "preset = 1979-05-27",
    "dates.toml": "[model]\ndim = 1979-05-27",
    "inf.toml": "[train]\nlearning_rate = inf",
    "text.parquet": "no parquet",
    "holes.parquet": b"PAR1" + b"\xff" * 40 + b"PAR1",
    "cut.txt.gz": gzip.compress(b"some text\n" * 1000)[:-20],
    "no.txt.gz": b"\x1f\x8bxxxxxxx",
    "no.zip": b"PK\x03\x04" + b"x" * 60,
    "deep.jsonl": "[" * 100_000 + "\n",
    "half.jsonl": '{"text": "a"}\n{"text": ',
    "number.jsonl": '{"text": 3}\n',
    "scores.jsonl": '{"query": "x", "scores": {"a": 1e400}}\n',
    "samples.jsonl": '{"query": "x", "samples": [1, 1e400]}\n',
    "no.gguf": b"GGUF" + b"\xff" * 100,
    "short.gguf": b"GG",
    "no.db": b"SQLite format 3\0" + b"\xff" * 200,
    "nan.csv": "a,b,nan\nb,c,1\n",
    "noise.csv": bytes(range(256)) * 20,
    "utf16.csv": "a,b\nb,c\n".encode("utf-16"),
    "huge.csv": "0,99999999999999999999\n1,2\n",
    "negative.csv": "-1,2\n3,x\n",
    "huge.mtx": "%%MatrixMarket matrix coordinate real general\n99999999999 99999999999 99999999999\n1 1 1\n",
    "huge.metis": "99999999999 99999999999\n1 2\n",
    "no.npz": b"PK\x03\x04xxxx",
    "no.mat": b"MATLAB 5.0 MAT-file" + b"\0" * 200,
    "no.anb": "x" * 100,
    "huge.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999999), }"
    + b" " * 40
    + b"\n",
}
TRAIN = "train demo --out z"
LINES = f"""
{TRAIN} --seed {HUGE}
{TRAIN} --seed -1
{TRAIN} --steps 1{"0" * 30}
{TRAIN} --set train.seed=1{"0" * 5000}
{TRAIN} --set train.learning_rate=inf
{TRAIN} --set train.learning_rate=nan
{TRAIN} --set train.betas=[2,3]
{TRAIN} --set model.dim=1e30
{TRAIN} --set model.dim=2147483648
{TRAIN} --set model.num_layers=100000000
{TRAIN} --set model.init_std=1e-46
{TRAIN} --set model.norm_eps=1e308
{TRAIN} --set data.validation_fraction=1
{TRAIN} --set data.corpus.kind=files --set 'data.corpus.paths=["cut.txt.gz"]'
{TRAIN} --set data.corpus.kind=files --set 'data.corpus.paths=["text"]' --set data.corpus.encoding=utf-99
{TRAIN} --set 'a=[[[['
{TRAIN} --set =
{TRAIN} --set model=3
{TRAIN} --config deep.toml
{TRAIN} --config long.toml
{TRAIN} --config latin.toml
train --out z --config preset.toml
{TRAIN} --config dates.toml
{TRAIN} --config inf.toml
{TRAIN} --config text
compare moe dense --out z --seeds {HUGE}
compare moe dense --out z --seeds 0-99999999999
compare moe dense --out z --seeds 0-{HUGE}
compare moe dense --out z --steps -1
compare moe deep.toml --out z
study rexmoe --out z --seeds 0-{HUGE}
study rexmoe --out z --set steps=1e30
cluster attention trained --ranks 0
cluster attention trained --ranks 2 --sequence-length {HUGE}
cluster attention trained --ranks 2 --sequence-length 64 --cached {HUGE}
cluster attention trained --ranks 2 --layout spiral
cluster attention trained --ranks 2 --network star
cluster attention trained --ranks 2 --bandwidth 0
cluster attention trained --ranks 2 --bandwidth fast
cluster attention trained --ranks 2 --latency-us nan
cluster attention trained --ranks 2 --efficiency nan
cluster attention trained --ranks 2 --hardware nothing
cluster elastic --replicas 0
cluster coordinate --listen 127.0.0.1:0 --restarts -1
cluster coordinate --listen 127.0.0.1:0 --max-frequency nan
cluster elastic --replicas 1024 --stages 1024
cluster elastic --stages 65
cluster elastic --lose 9
cluster elastic --lose 0:0
cluster elastic --lose 0:{HUGE}
cluster elastic --lose one
cluster elastic --stages 1 --replicas 1
cluster elastic --memory 1GB
cluster elastic --bandwidth 0
cluster elastic --bandwidth fast
cluster elastic --layer-ms nan
cluster elastic --micro-batches {HUGE}
cluster elastic --max-frequency nan
cluster elastic trained --layers 3
cluster elastic trained --stages 64
cluster elastic trained --hardware nothing
cluster elastic text
cluster attention trained --network nodes
cluster attention trained --network nodes --node-ranks 4
cluster attention trained --between 1GB
cluster attention trained --node-ranks 3
cluster attention trained --network nodes --node-ranks 4 --between much
cluster bench --peers 1
cluster bench --peers {HUGE}
cluster bench --size much
cluster bench --size 3B
cluster bench --size 6B
cluster bench --size 1TiB
cluster bench --rounds 0
cluster bench --connections 65
cluster bench --bits 16
cluster bench --quantise min_max --bits 9
cluster bench --quantise much
cluster bench --links nan
cluster bench --wait nan
cluster bench --advertise 10.0.0.1
cluster bench --secret-file nowhere
cluster bench --listen 127.0.0.1:0 --master 127.0.0.1:1
cluster bench --listen 0.0.0.0:0 --wait 1
cluster bench --listen nowhere.invalid:1
cluster bench --listen 127.0.0.1:0 --secret-file nowhere
cluster bench --master 127.0.0.1:1 --wait 1
cluster bench --master 127.0.0.1:99999 --wait 1
cluster churn --seconds nan
cluster churn --seconds 0
cluster churn --peers 2
cluster churn --peers {HUGE}
cluster churn --every 0
cluster churn --hangs 2
cluster churn --master-every nan
cluster churn --numbers 0
cluster churn --seed {HUGE}
cluster coordinate --listen nowhere.invalid:1
cluster coordinate --listen 127.0.0.1:99999
cluster coordinate --listen ::1
cluster coordinate --listen 127.0.0.1:0 --secret-file nowhere
cluster coordinate --listen 127.0.0.1:0 --dead-after nan
cluster coordinate --listen 127.0.0.1:0 --chunk 0
cluster coordinate --listen 127.0.0.1:0 --chunk much
cluster coordinate --listen 127.0.0.1:0 --replicas {HUGE}
cluster coordinate --listen 127.0.0.1:0 --stages 0
cluster coordinate --listen 0.0.0.0:0
cluster coordinate --listen 127.0.0.1:0 --threshold 2
cluster coordinate --listen 127.0.0.1:0 --threshold nan
cluster coordinate --listen 127.0.0.1:0 --expected-steps 0
cluster coordinate --listen 127.0.0.1:0 --bandwidth fast
cluster master --listen nowhere.invalid:1
cluster master --listen 127.0.0.1:99999
cluster master --listen ::1
cluster master --listen 127.0.0.1:0 --journal deep.json
cluster master --listen 127.0.0.1:0 --journal text
cluster master --listen 127.0.0.1:0 --secret-file nowhere
cluster master --listen 127.0.0.1:0 --secret-file no.db
cluster master --listen 127.0.0.1:0 --dead-after nan
cluster master --listen 127.0.0.1:0 --connect-within nan
cluster master --listen 127.0.0.1:0 --most-peers {HUGE}
cluster plan trained --ranks 0
cluster plan trained --ranks 99999
cluster plan trained --ranks 64
cluster plan trained --ranks 2 --schedule pipedream
cluster plan trained --ranks 2 --schedule gpipe --visits 2
cluster plan trained --ranks 2 --micro-batches {HUGE}
cluster plan trained --ranks 2 --hardware nothing
cluster plan trained --ranks 2 --efficiency nan
cluster plan trained --ranks 2 --sequences {HUGE}
cluster plan trained --ranks 2 --picture x.txt
cluster fabric all-to-one
cluster fabric --network leaf-spine:99999999x4x4
cluster fabric --network fat-tree:{"9" * 5000}
cluster fabric --network noise.csv
cluster fabric --network nan.csv
cluster fabric --network utf16.csv
cluster fabric --bytes 1e300
cluster fabric --seed {HUGE}
cluster fabric --ranks {HUGE}
cluster fabric --slow leaf0-spine0=nan
cluster fabric --slow leaf0-spine0=1e300
cluster fabric --scheme split:{"9" * 5000}
cluster fabric --trace holes.parquet
cluster fabric --trace text --layer {HUGE}
cluster plan text
cluster plan no.gguf
eval trained --tokens -1
eval trained --sequence-length 0
eval trained --device meta
eval trained --device cuda:99999999999
eval trained --data no.zip
eval trained --data no.txt.gz
eval trained --data cut.txt.gz
eval trained --data holes.parquet
eval trained --data deep.jsonl
eval trained --data half.jsonl
eval trained --data number.jsonl
eval no.gguf
eval short.gguf
eval /dev/null
generate trained -p x --max-tokens {HUGE}
generate trained -p x --temperature inf
generate trained -p x --temperature nan
generate trained -p x --top-k {HUGE}
generate trained -p x --top-p nan
generate trained -p x --seed {HUGE}
generate trained -p x --rewire-set steps=3
generate trained -p x --rewire --streams 2
generate trained -p x --rewire --context 1
generate trained -p x --context 0
generate trained -p x --instruction y
chat trained -m x --instruction y
generate trained -p x --context 2
generate trained -p x --context {HUGE}
generate trained -p x --context 1 --min-p 0.1
generate trained -p x --context 1 --streams 2
generate trained -p x --rewire --min-p 0.1
generate trained -p x --rewire --quantize int8 --expert-budget 1MB
generate trained -p x --rewire --rewire-set
generate trained -p x --rewire --rewire-set steps
generate trained -p x --rewire --rewire-set steps=0
generate trained -p x --rewire --rewire-set steps={HUGE}
generate trained -p x --rewire --rewire-set r=2
generate trained -p x --rewire --rewire-set r=0.25
generate trained -p x --rewire --rewire-set choice=soft
generate trained -p x --rewire --rewire-set eta=nan
generate trained -p x --rewire --rewire-set window=3
generate trained -p x --rewire --rewire-set interval=half
generate trained -p x --rewire --rewire-set stepz=3
generate trained -p x --rewire-save z
generate trained -p x --rewire --rewire-load nowhere
generate trained -p x --rewire --rewire-load deep.json
generate trained -p x --rewire --rewire-load scores.jsonl --rewire-save z
generate trained -p x --rewire --rewire-load text
chat trained -m x --rewire-set steps=3
chat trained -m x --rewire --task law
chat trained -m x --rewire --rewire-set steps=0
generate no.gguf -p x
chat trained -m x --temperature nan
chat trained -m x --seed {HUGE}
chat trained -m x --depth nowhere
chat trained -m x --depth text
chat trained -m x --depth-control nan --depth nowhere
chat trained -m x --depth-control 0.5
chat trained -m x --skipper text
chat trained -m x --skipper nowhere --depth nowhere
generate trained -p x --depth text
generate trained -p x --depth-control nan --depth nowhere
generate trained -p x --skipper text
generate trained -p x --skipper holes.parquet
report text.parquet --out z
report holes.parquet --out z
report text --out z
oracle trained --out z
train --out z --patience 0
train --out z --patience 2 --set train.eval_every=none
train --out z --keep-best --set data.validation_fraction=0
train --out z --labels text
train --out z --labels text --from trained
train duo --out z --labels deep.jsonl --from trained
oracle text --out z
convert no.gguf z --to native
convert trained z --to native --quantize int4 --group {HUGE}
convert trained /dev/null --to native
eval trained --rewire-after 3
eval trained --rewire --rewire-after 0
eval trained --rewire --rewire-after {HUGE}
eval trained --rewire --cached
eval trained --rewire --rewire-set interval=half
eval trained --rewire --rewire-after 32
eval trained --adapter text
eval trained --adapter text --task x
adapt trained text --out z
adapt trained no.jsonl --out z
adapt trained deep.jsonl --out z
adapt trained cut.txt.gz --out z
adapt no.gguf text/alpha/0.py --out z
adapt trained deep.jsonl --out z --method lorra
adapt trained deep.jsonl --out z --learning-rate nan
adapt trained deep.jsonl --out z --steps {HUGE}
adapt trained deep.jsonl --out z --rank {HUGE}
adapt trained deep.jsonl --out z --seed {HUGE}
adapt trained deep.jsonl --out z --mode z
adapt trained deep.jsonl --out z --patience 0
adapt trained deep.jsonl --out z --patience 2
adapt trained deep.jsonl --out z --keep-best
adapt trained deep.jsonl --out z --eval-every 0
adapt trained deep.jsonl --out z --from text
adapt --out trained --resume
pvchat pretrain nowhere --out z
pvchat pretrain text --out z
pvchat pretrain no.zip --out z
pvchat pretrain cut.txt.gz --out z --steps {HUGE}
pvchat pretrain text --out z --seed {HUGE}
pvchat pretrain text --out z --set learning_rate=nan
pvchat pretrain text --out z --set model.dim=1e30
pvchat pretrain text --out z --set model.dim=2147483648
pvchat pretrain text --out z --set model.heads.control.k=inf
pvchat pretrain text --out z --heads dense
pvchat learn trained text --name x --bank text --out z
pvchat learn nowhere text --name x --bank text --out z
pvchat ask trained text "where is <a> ?"
pvchat ask nowhere nowhere x
pvchat eval trained text --name x --subject y
pvchat eval nowhere text --name x --subject y --clips {HUGE}
pvchat ways nowhere text --bank text --out z
pvchat ways trained no.zip --bank text --out z
pvchat ways trained text --bank text --out z --clips {HUGE}
pvchat ways trained text --bank text --out z --only ,
pvchat ways trained text --bank text --out z --seed {HUGE}
pvchat ways trained text --bank text --out z --set learning_rate=nan
pvchat compose no.zip --out z
pvchat compose nowhere --out z
pvchat compose text --out z --frames {HUGE}
adapters card trained
adapters describe trained --instruction x
adapters gates trained --model trained --data text
adapters gates nowhere --model trained --data text
adapters list --family ''
adapters estimate trained lora --rank {HUGE}
adapters estimate trained lora --set rank={HUGE}
adapters estimate trained lora --set alpha=nan
adapters estimate trained lora --set targets=3
adapters estimate text lora
adapters recommend trained --max-share inf
adapters recommend trained --max-file nan
adapters recommend trained --measurements deep.json
adapters recommend trained --measurements half.jsonl
adapters merge trained --out z
adapters merge text deep.json --weights nan,1 --out z
adapters merge text --weights {HUGE}{"0" * 400} --out z
adapters merge text --method ties --density nan --out z
adapters merge text --method dare --seed {HUGE} --out z
adapters fuse trained text --out z
adapters fuse trained no --out z
adapters fuse trained text --out z --task x
adapters eval trained
adapters eval trained --data text
adapters eval trained --data deep.jsonl
adapters eval trained --data cut.txt.gz
adapters eval trained text --data deep.jsonl
adapters eval trained --data deep.jsonl --answers {HUGE}
adapters eval trained --data deep.jsonl --max-tokens {HUGE}
adapters eval trained --data deep.jsonl --batch-size {HUGE}
adapt trained deep.jsonl --out z --method vera
adapt trained deep.jsonl --out z --method dora --set method.size=1
adapt trained deep.jsonl --out z --method lst --set method.expansion={HUGE}
adapters export trained text --out z
adapters export trained --out z
adapters export trained --rank 2 --out z
rl train --out z
rl train cartpole --out z --samples 0
rl train cartpole --out z --samples {HUGE}
rl train cartpole --out z --seed {HUGE}
rl train cartpole --out z --set task.gamma=nan
rl train cartpole --out z --set task.hidden=[0]
rl train cartpole --out z --set task.num_envs=1e30
rl train cartpole --out z --set task.num_envs=2147483647
rl train cartpole --out z --set task.rollout_steps=2147483647 --samples 99999999999999
rl train cartpole --out z --set task.hidden=[2147483647,2147483647]
rl train cartpole --out z --set task.epochs=2147483647
rl train cartpole --out z --set task.environment.kind=nowhere
rl train cartpole --out z --set task.environment.workers=-1
rl eval z --referee carla
rl train laneworld --out z --set task.environment.world.traffic=nan
rl train laneworld --out z --set task.environment.world.longest_m=60
rl train cartpole --out z --set task.reward_scale=0
rl train cartpole --out z --set train.learning_rate=inf
rl train router-r1 --out z --samples 0
rl train router-r1 --out z --set task.world.alpha=nan
rl train router-r1 --out z --set task.world.entities=1e30
rl train router-r1 --out z --set task.world.experts=2147483647
rl train router-r1 --out z --set task.model.dim=2147483647
rl train router-r1 --out z --set task.questions=2147483647
rl train router-r1 --out z --set task.slots=2147483647
rl train router-r1 --out z --set task.max_positions=0
rl train router-r1 --out z --set warm.traces=2147483647
rl train router-r1 --out z --set task.temperature=0
rl train router-r1 --out z --set warm.traces=0
rl train router-r1 --out z --set warm.learning_rate=inf
rl train router-r1-grpo --out z --set task.group=1
rl train router-r1 --out z --model no.gguf --data half.jsonl --pool deep.toml
rl train router-r1 --out z --model trained --data number.jsonl --pool deep.toml
rl train router-r1 --out z --model trained --data number.jsonl --pool dates.toml
rl train router-r1 --out z --model trained --data number.jsonl --pool nowhere.toml
rl train router-r1 --out z --model trained
rl train grpo --out z --model trained --data half.jsonl
rl train grpo --out z --model trained --data deep.jsonl
rl train grpo --out z --model trained --data nowhere.jsonl
rl train grpo --out z --model trained --data half.jsonl --reward nowhere:nothing
rl train grpo --out z --model no.gguf --data half.jsonl
rl train token-ppo --out z
rl train cartpole --out z --max-usd nan
rl train cartpole --out z --max-calls {HUGE}
rl eval trained --max-usd inf
rl replay trained --out z.txt --episode {HUGE}
rl train --out text --resume
rl train --out trained --resume
rl eval trained
rl eval text
rl eval no.gguf
rl replay trained --out z.gif
rl replay trained --out z.gif --frames {HUGE}
heads train
heads train trained --out z --target nan
heads train trained --out z --shared {HUGE}
heads train trained --out z --set model.attention.heads.block=0
heads train trained deep.json --out z --steps {HUGE}
heads train trained no.zip --out z
heads report trained
heads report no.gguf
heads report trained --trace z
heads transcribe trained no.wav
heads transcribe no.gguf x
adapters route trained x
adapters cluster trained --clusters 1
adapters cluster trained --clusters 0 --out z
adapters cluster trained --clusters {HUGE} --out z
adapters cluster nowhere --clusters 1 --out z
adapters route nowhere x --model trained
adapters route trained ''
depth search trained no.jsonl --out z
depth search trained deep.jsonl --out z
depth search trained half.jsonl --out z
depth search trained text --out z --simulations {HUGE}
depth search trained text --out z --reward best
depth search trained text --out z --reward nowhere:x
depth search trained text --out z --set widening=nan
depth search trained text --out z --context {HUGE}
depth search trained text --data text --out z
depth search no.gguf text --out z
depth search trained text --out text
depth train trained --out z
depth train trained deep.jsonl --out z
depth train trained half.jsonl --out z
depth train trained nowhere --out z
depth train trained number.jsonl --out z --set gamma=nan
depth eval trained text --routers text
depth eval trained text --control nan
depth eval trained text --control 2
depth eval trained half.jsonl
depth report trained text --routers nowhere --out z
depth prune trained text --out z --sparsity 0.9
depth prune trained text --out z --sparsity nan
depth prune trained text --out z --sparsity -1
depth prune trained text --out z --steps {HUGE}
depth prune trained text --out z --set schedule.grid=0
depth prune trained text --out z --set training.distance=l1
depth prune trained text --out z --set factors.refresh=nan
depth prune trained text --out z --mode best
depth prune trained text --out z --context {HUGE}
depth prune trained no.jsonl --out z
depth prune trained half.jsonl --out z
depth prune trained deep.jsonl --out z
depth prune trained text --data text --out z
depth prune no.gguf text --out z
depth prune trained text --out text
depth prune-eval trained nowhere --data text
depth prune-eval trained text --data text
depth prune-eval trained short.gguf --data text
depth redundancy trained half.jsonl
depth redundancy trained text --context {HUGE}
depth oracle trained --out z
adapters report trained text --out z
adapters report trained trained --data text --out z
adapters report trained arrow:text --out z
adapters report trained text --rows 0 --out z
experts fit-predictor trained no.npz --out z
experts fit-predictor trained text --out z --expert-budget nan
experts fit-predictor trained holes.parquet --out z
experts fit-predictor trained text --out z --max-tokens {HUGE}
experts fit-predictor trained text --out z --seconds nan
info no.gguf
info demo --size ''
info trained --dtype ''
plan demo --hardware deep.json
plan demo --hardware text.parquet
plan demo --memory 2GiB --hardware a100
plan trained --memory 0
plan --memory 2GiB
plan deep.json --memory 2GiB
serve trained --port 99999999
serve trained --memory many
serve trained --memory 1MiB
serve trained --memory 2GiB --devices 2
serve trained --context 2
serve trained --context 0
serve trained --context 1 --memory 2GiB
serve trained --context 1 --devices 2
serve trained --context 1 --depth nowhere
serve trained --context 1 --expert-budget 1GiB
serve trained --context 1 --adapter a=nowhere
serve trained --context 1 --set engine.context_timeout_s=0
serve trained --adapter text
serve trained --adapter a=nowhere
serve trained --adapter a+b=nowhere
serve trained --adapter a=text --adapter a=text
serve trained --adapter trained=text
serve trained --adapter a=nowhere --devices 2
serve trained --adapter-root nowhere
serve trained --adapter-memory many
serve trained --depth nowhere
serve trained --depth text
serve trained --depth-control 0.5
serve trained --depth-control nan --depth nowhere
serve trained --depth nowhere --devices 2
serve no.gguf
graph info deep.json
graph info nan.csv
graph info noise.csv
graph info huge.csv --ids numbers
graph info negative.csv --ids numbers
graph info huge.mtx
graph info huge.metis
graph info no.npz
graph info no.mat
graph info no.anb
graph info holes.parquet
graph ppr karate --alpha nan
graph ppr karate --tol -1
graph ppr karate nobody
graph ppr karate --seeds holes.parquet
graph embed karate -o z.csv --dim {HUGE}
graph tune karate --hide nan
graph tune karate --set weights=[nan]
graph resume no.anb karate --save z.anb
graph transform no.anb --out z.npy
graph predict no.anb holes.parquet
graph embed karate -o z --engine spark
graph embed karate -o z.csv --engine cluster
graph index karate -o z --walks 5 --engine spark
graph index huge.npy -o z --engine spark
graph ppr holes.parquet --all --engine spark --ids names -o z
graph ppr holes.parquet --all --engine spark
graph index huge.npy -o z.anb
graph index huge.npy -o z.anb --disk
graph index huge.npy -o z.anb --disk --memory nan
graph index huge.npy -o z.anb --metric hamming
graph index huge.npy -o z.anb --quantization pq --code-bytes 0
graph search no.anb --rows 0 --radius nan
graph rewalk no.anb karate --add holes.parquet --out z.anb --out-graph z2.anb
graph search no.anb huge.npy
graph rank holes.parquet a
graph peer z.db --items holes.parquet --rounds 0
graph serve no.anb
graph serve no.anb --fsync often
graph serve no.anb --dim 8 --metric l1
graph remove no.anb 1
graph update no.anb huge.npy
graph search no.anb --rows 0-99999999999999999999
gateway serve deep.toml
gateway serve long.toml
gateway serve deep.yaml
gateway serve date.yaml
gateway serve latin.toml
gateway fit scores.jsonl --out z
gateway fit deep.jsonl --out z
gateway fit no.db --out z
gateway fit holes.parquet --out z
gateway eval scores.jsonl --seeds {HUGE}
gateway route holes.parquet x
gateway replay no.db
routers fit scores.jsonl --out z
routers fit no.db --out z
routers eval scores.jsonl --seeds {HUGE}
routers route x --router none
routers replay no.db
gateway collect -c latin.toml --judge a --out o.jsonl
gateway collect -c none.toml --judge exact --out o.jsonl
gateway collect -c deep.toml --judge a --out o.jsonl
gateway ab no.db
gateway coe frontier --router none
gateway coe report no.db --router none
routers coe frontier --router none --by x
routers coe report --router none
gateway add-model x
gateway add-model x -c latin.toml
gateway add-model x -c none.toml --outcomes deep.jsonl
gateway add-model x --url http://127.0.0.1:9
gateway add-model x --url nowhere
gateway ab latin.toml try
gateway serve --router none --check
gateway import deep.yaml
gateway import date.yaml
gateway keys create x --store n.db --rpm {HUGE}
gateway keys create x --store n.db --tpm {HUGE}
gateway keys create x --store n.db --speaks-for team:a
gateway keys create x --store n.db --budget nan
gateway keys create x --store n.db --budget inf
gateway keys create x --store n.db --budget 1e300
gateway keys create x --store n.db --expires {"9" * 5000}d
gateway budget set global 1e999999 --store n.db
gateway budget set global 1e99999999999999999999 --store n.db
gateway budget set global nan --store n.db
gateway budget set global {"9" * 5000} --store n.db
gateway ledger list --store no.db --since {"9" * 5000}d
gateway ledger prune {"9" * 300}d --store no.db
gateway collect -c latin.toml --judge a --out o.jsonl --rate nan
gateway eval scores.jsonl --test-share nan
gateway fit scores.jsonl --out z --hold-out nan
gateway curve scores.jsonl
gateway curve deep.jsonl
gateway curve no.db
gateway curve samples.jsonl
gateway curve text --eps nan
gateway curve text --value 1e400
gateway curve text --right 2
gateway curve text --seed {HUGE}
gateway curve text --picture z
routers curve text --cost -inf
gateway probe deep.jsonl --out z
gateway probe number.jsonl --out z.json
routers probe scores.jsonl --system1 b --out z.json
routers probe number.jsonl --out z.json --penalty nan
gateway scale number.jsonl --url http://127.0.0.1:9/v1 --system1 a --out z
gateway scale none.jsonl --url http://127.0.0.1:9/v1 --system1 a --out z --samples {HUGE}
routers scale deep.jsonl --url nowhere --system1 a --out z
routers scale half.jsonl --url http://127.0.0.1:9/v1 --system1 a --out z --config deep.toml
gateway route x --router z --trade-off nan
gateway serve --drain nan
gateway serve --drain -3
gateway serve --workers 0
gateway serve --workers many
gateway keys list --store no.db
gateway budget list --store no.db
gateway ledger list --store no.db
""".strip().splitlines()


@pytest.fixture(scope="module")
def damaged_files(work):
    for name, content in FILES.items():
        (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())


# A third of them, from all over, is tried each time; all by make test-all.
CASES = [
    pytest.param(line, id=line[:90], marks=[pytest.mark.slow] if place % 3 or line.startswith("serve") else [])
    for place, line in enumerate(LINES)
]


@pytest.mark.parametrize("line", CASES)
def test_is_told_in_one_line(here, trained, damaged_files, line, work):
    code, _, err = here(*shlex.split(line))
    told = [part for part in err.splitlines() if part.startswith("error: ")]
    assert (code, len(told)) == (2, 1), err
    assert err.splitlines()[-1] == told[0]
    assert "fault inside anabranch" not in err
    assert "Traceback" not in err
    assert len(told[0]) < 1100
    assert not (work / "z").exists()


def test_every_command_is_among_them():
    from typer.main import get_command

    from anabranch.cli.main import app

    commands = get_command(app).commands
    groups = {name for name, command in commands.items() if hasattr(command, "commands")}
    known = set(commands) | {f"{group} {name}" for group in groups for name in commands[group].commands}
    used = {" ".join(line.split()[: 2 if line.split()[0] in groups else 1]) for line in LINES}
    assert known - groups - used <= {"doctor"}
    assert len(LINES) >= 60


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate trained -p x --temperature 1e-46 --max-tokens 2 --json", "token_ids"),
        ("generate trained -p x --seed 9223372036854775807 --max-tokens 2 --json", "token_ids"),
        ("generate trained -p x --top-p 1e-30 --max-tokens 2 --json", "token_ids"),
    ],
)
def test_the_extremes_that_are_allowed_work(here, trained, line, said):
    code, out, err = here(*line.split())
    assert (code, err) == (0, "")
    assert said in json.loads(out)
