# Sourced: runs named steps one after the other, goes on after a failure, and ends with a list of all of them.
# If STEPS_FILE is set, each outcome is appended to it for a caller that sums up several scripts, and what a step that
# failed said last to STEPS_FILE.said; a step may take 40 minutes then, so that one that hangs is heard of.

steps_names=()
steps_results=()
steps_failed=0

# step NAME COMMAND...
step() {
    local name=$1 begun=$SECONDS result=ok attempt said writer
    shift
    printf '\n==> %s\n' "$name"
    if [ -n "${STEPS_FILE-}" ]; then
        exec {said}> >(exec tee -- "$STEPS_FILE.step")
        writer=$!
        timeout --kill-after=30 2400 "$@" >&"$said" 2>&1 {said}>&- || result="FAILED ($?)"
        exec {said}>&-
        # Its end is waited for, but not for ever: a step may leave something running.
        for attempt in 1 2 3 4 5; do
            kill -0 "$writer" 2>/dev/null || break
            sleep 0.2
        done
        if [ "$result" != ok ]; then
            { printf '\n==> The end of: %s\n' "$name"; tail -n 120 -- "$STEPS_FILE.step"; } >>"$STEPS_FILE.said"
        fi
    else
        "$@" || result="FAILED ($?)"
    fi
    [ "$result" = ok ] || steps_failed=$((steps_failed + 1))
    steps_names+=("$name")
    steps_results+=("$(printf '%5d s  %s' $((SECONDS - begun)) "$result")")
    [ -z "${STEPS_FILE-}" ] || printf '%s\t%d\t%s\n' "$name" $((SECONDS - begun)) "$result" >>"$STEPS_FILE"
}

# Prints every step's outcome; fails if one of them failed.
finish() {
    local index
    printf '\n'
    for index in "${!steps_names[@]}"; do
        printf '%-44s %s\n' "${steps_names[$index]}" "${steps_results[$index]}"
    done
    [ "$steps_failed" -eq 0 ]
}
