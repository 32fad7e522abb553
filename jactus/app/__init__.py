"""The command line and what it writes, on top of the package: a model's folder, its card, its record and its page.

Begin in `main` (the verbs, which `verbs` defines) and `fitting` (the stages that `jactus fit` goes through, each resumable by `work`;
`finish` is their end). `guess`, `tables`, `rows` and `encoding` turn a file into batches. `record` is what a run did, as one JSON
file beside the model; `card` and `page` are made from it alone. `estimate` needs no more than a config.json.
"""
