# Sourced: runs named steps one after the other, goes on after a failure, and ends with a list of all of them.
# If STEPS_FILE is set, each outcome is appended to it for a caller that sums up several scripts.

steps_names=()
steps_results=()
steps_failed=0

# step NAME COMMAND...
step() {
    local name=$1 begun=$SECONDS result=ok
    shift
    printf '\n==> %s\n' "$name"
    "$@" || result="FAILED ($?)"
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
