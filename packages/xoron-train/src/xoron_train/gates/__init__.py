"""Gates between training stages: what a finished model must show, on samples, with a report.

    suite    names gates and what they are asked on (`suite`)
    run      asks a model folder and writes MODEL/gates/SUITE.json (`run`, `report`)
    require  lets a recipe start only from a model that carries a passed report (`requirement`)

A gate is an evaluation (`xoron_train.evaluations`) whose figures have thresholds, so a plug-in that
offers an evaluation offers a gate. Importing this package imports nothing heavy.
"""
