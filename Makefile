# make demo      synthetic scenes through all nine steps on the CPU, about seven minutes after the installation
# make install   the virtual environment with what running needs; make test and make lint add what they need
# make test      the tests; make test-numerics those that compute, as on another processor; make test-long the slow ones
# make test-gpu  the tests that need a GPU; make gpu these tests and every benchmark of a GPU, at most 8 minutes
# make lint      style and types; make bench the benchmarks
# VENV=<folder> uses an environment that exists, and installs into it only what is missing
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
WORKERS ?= 2
NUMERIC = $(patsubst %,tests/test_%.py,generator crf prc ir_loss models upsampling map_files inference training recipe masks ios augment)
DEMO = --dataset demo
# of the paper's scales all but 0.5: a patch of 128 px would leave a feature map of 4 x 4
SCALES = --scales 1.0 1.5 2.0
SMALL = --backbone resnet18 --weights none
CLASSIFIER = $(SMALL) --train-all --epochs 12 --lr 0.003 --momentum 0.9 --workers 0
SEGMENTER = $(SMALL) --no-freeze-norm --width 64 --epochs 7 --batch-size 8 --lr 0.003 --momentum 0.9 --workers 0

.PHONY: install demo demo-data demo-supervised demo-weak test test-numerics test-long test-gpu gpu lint bench clean

# pip without an index succeeds where nothing is missing, and changes nothing
define INSTALL
@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
@$(RUN) -m pip install --quiet --no-index --requirement $< 2> /dev/null || { \
echo "installing what is missing in $(VENV); torch and the rest take about 6 GB and a few minutes" && \
$(RUN) -m pip install --quiet --requirement $< --constraint constraints.txt; }
@touch $@
endef

$(VENV)/.installed: requirements.txt constraints.txt
	$(INSTALL)

$(VENV)/.installed-dev: requirements-dev.txt constraints.txt $(VENV)/.installed
	$(INSTALL)

install: $(VENV)/.installed

# large memory pages, which glibc asks Linux for: a training step takes up to a tenth less time
demo demo-weak demo-supervised: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

demo: demo-data demo-weak demo-supervised
	$(RUN) evaluate_miou.py $(DEMO) --workers $(WORKERS)
	@echo "the story in pictures: experiments/demo/prc/scores/report.html"

demo-data: $(VENV)/.installed
	$(RUN) datasetsprocess/make_demo_scenes.py
	$(RUN) datasetsprocess/vaihingen_patch_split.py $(DEMO) --workers $(WORKERS)
	$(RUN) datasetsprocess/process.py $(DEMO) --workers $(WORKERS)
	$(RUN) PRC_SAM/get_se_map.py $(DEMO) --generator felzenszwalb --workers $(WORKERS)

demo-weak: demo-data
	$(RUN) train_classification.py $(DEMO) $(CLASSIFIER)
	$(RUN) infer_classification.py $(DEMO) $(SCALES) --workers $(WORKERS)
	$(RUN) make_pseudo_labels.py $(DEMO) --workers $(WORKERS)
	$(RUN) generate_refined_pseudo.py $(DEMO) --workers $(WORKERS)
	$(RUN) train_segmentation.py $(DEMO) $(SEGMENTER)
	$(RUN) inference_segmentation.py $(DEMO) $(SCALES) --workers $(WORKERS)
	$(RUN) generate_refined_seg.py $(DEMO) --workers $(WORKERS)

demo-supervised: demo-data
	$(RUN) train_segmentation.py $(DEMO) --experiment supervised --labels truth $(SEGMENTER)
	$(RUN) inference_segmentation.py $(DEMO) --experiment supervised $(SCALES) --workers $(WORKERS)

# two processes, in random order: pytest-xdist and pytest-randomly
test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n $(WORKERS)

# the same sums, added in another order: without the processor's wide instructions, with one thread and with two
test-numerics: $(VENV)/.installed-dev
	for threads in 1 2; do ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=$$threads \
	$(RUN) -m pytest -k "not script" $(NUMERIC) || exit 1; done

test-long: $(VENV)/.installed-dev
	$(RUN) -m pytest -m long

test-gpu: $(VENV)/.installed-dev
	PRC_TEST_DEVICE=cuda $(RUN) -m pytest -m cuda

gpu: $(VENV)/.installed-dev
	$(RUN) benchmarks/gpu.py

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy .

bench: $(VENV)/.installed
	for script in $(filter-out %/measure.py %/maps.py %/gpu.py %/label_review.py,$(wildcard benchmarks/*.py)); do OMP_NUM_THREADS=1 $(RUN) $$script || exit 1; done

clean:
	rm -rf datasets/demo experiments/demo
