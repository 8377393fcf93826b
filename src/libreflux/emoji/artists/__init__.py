"""The emoji family's next pictures: every subject by several artists, in any place and size, on backgrounds of kinds.

`subjects` has the drawings, `scenes` what a picture shows, `captions` how it is told, `held_out` what nobody trains on,
`build` what makes models of it. The shipped weights are still of `libreflux.emoji.compose`.
"""
