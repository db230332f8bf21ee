"""Public benchmarks, read from folders on this machine in the layout they are published in. Nothing is downloaded.

tvbench      json/TASK.json               video/TASK/NAME                           TASK: action_count, moving_direction ...
mvbench      json/TASK.json               video/SOURCE/NAME (a folder of frames at  TASK: action_sequence ... (20 of them);
             (list of rows: video,        3 a second for episodic_reasoning)        SOURCE: `lab.benchmark_rows.MVBENCH`
             question, candidates,
             answer, start, end)
tomato       data/TASK.json               videos/TYPE/KEY.mp4                       TASK: count, direction, rotation, shape&trend,
             ({id: question, options,     (TYPE: human, object, simulated)          velocity&frequency, visual_cues
             answer, key, ...})
tempcompass  questions/FORMAT.json        videos/ID.mp4                             FORMAT: multi-choice, yes_no, caption_matching,
             ({id: {aspect: [question,                                              captioning; a task is FORMAT or
             answer]}})                                                             FORMAT/ASPECT, e.g. yes_no/direction

Read: daniel-cores/tvbench `infer.ipynb`, `vqa_dataset.py`; OpenGVLab/Ask-Anything `mvbench.ipynb`; yale-nlp/TOMATO
`src/evaluate.py`, `src/generate_lib/qwen.py`, `data/`; llyx97/TempCompass `run_qwen2_vl.py`, `questions/`.
`lab.items.load_items` takes them as `{"benchmark": "tvbench", "folder": ..., "task": ..., "n": ...}`.
"""
