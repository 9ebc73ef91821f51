"""A day of traffic in some minutes: loads, replacements, bad folders, aborts, preemption at once.

    python -m integration_tests.soak --minutes 20

`world` is what clients ask for and what they must get, `acts` what they do, `api` how they say it,
`measure` what a server must not keep, `report` the table and the verdict; `deaths` kills servers.
"""
