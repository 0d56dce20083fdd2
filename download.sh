#!/usr/bin/env bash
# Downloads the two official TinyStories files (2.3 GB) into data/tinystories/ beside this script. Safe to run again:
# a file that is there and right is left alone, and a download that was cut off continues where it stopped.
# Nothing gets its final name before its size and SHA-256 are right.
#
#   HF_ENDPOINT             base address, for a mirror                      (https://huggingface.co)
#   DOWNLOAD_STALL_SECONDS  drop a connection that is silent for so long    (30)
#   DOWNLOAD_RETRY_SECONDS  pause before the first retry, then doubled      (2)
#   DOWNLOAD_MANIFEST       a file with lines "bytes sha256 name" instead of the two official ones (the tests use it)
#
# Needs curl or wget. Written for the oldest shells about (bash 3.2 on macOS, Git Bash).
set -u

official="2227753162 6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443 TinyStoriesV2-GPT4-train.txt
22502601 6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d TinyStoriesV2-GPT4-valid.txt"
endpoint=${HF_ENDPOINT:-https://huggingface.co}
base="${endpoint%/}/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
folder="$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/data/tinystories"
lock="$folder/.download.lock"
answer="$folder/.download.answer" # what curl or wget reports about the server's answer
stall_seconds=${DOWNLOAD_STALL_SECONDS:-30}
retry_seconds=${DOWNLOAD_RETRY_SECONDS:-2}
retries=5 # in a row; a connection that brought something starts the count anew
child=""

die() {
    printf 'download.sh: %s\n' "$@" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

size_of() { if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi; }

sha256_of() { if has sha256sum; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -c1-64; }

choose_tools() {
    has sha256sum || has shasum || die "sha256sum or shasum is needed to check the files: install coreutils or perl."
    tool=curl
    progress="--silent --show-error"
    [ ! -t 2 ] || progress="--progress-bar"
    has curl && return
    tool=wget
    progress="-nv"
    [ ! -t 2 ] || progress="-nv --show-progress"
    has wget || die "neither curl nor wget is installed. Install one of them, or download by hand" \
        "  $base/TinyStoriesV2-GPT4-train.txt" "  $base/TinyStoriesV2-GPT4-valid.txt" "into $folder"
}

# Two runs would write into the same .part file. A lock left by a killed run does not count, unless its curl still lives.
take_lock() {
    if [ -f "$lock" ]; then
        for process in $(cat "$lock" 2>/dev/null); do
            ! kill -0 "$process" 2>/dev/null || die "another download is running (process $process): wait for it or end it." \
                "If process $process is something else, delete $lock"
        done
        rm -f "$lock"
    fi
    (set -C && echo $$ >"$lock") 2>/dev/null || die "cannot create $lock: is the folder writable, is another download starting?"
    trap 'rm -f "$lock" "$answer"' EXIT
    trap stop INT TERM HUP
}

stop() {
    [ -z "$child" ] || { kill "$child" && wait "$child"; } 2>/dev/null
    echo "download.sh: stopped. What came is kept; run ./download.sh again to continue." >&2
    exit 130
}

# One connection that appends to $part. Sets status (of curl or wget) and code (HTTP, 0 for no answer).
# It runs in the background because a shell acts on signals only while it waits.
fetch() {
    if [ "$tool" = curl ]; then # $progress holds several words on purpose
        curl $progress --location --fail --continue-at - --output "$part" --connect-timeout "$stall_seconds" \
            --speed-limit 1000 --speed-time "$stall_seconds" --write-out 'HTTP/ %{http_code}\n' "$url" >"$answer" &
    else
        wget $progress --continue --output-document="$part" --tries=1 --timeout="$stall_seconds" \
            --server-response --output-file="$answer" "$url" &
    fi
    child=$!
    echo "$$ $child" >"$lock"
    status=0
    wait "$child" || status=$?
    child=""
    code=$(awk '/^ *HTTP\// { code = $2 } END { print code + 0 }' "$answer")
    [ "$tool" = curl ] || [ "$status" -eq 0 ] || tail -n 1 "$answer" >&2
}

give_up() {
    [ -s "$part" ] || rm -f "$part"
    die "$name could not be downloaded." "  from:     $url" "  expected: $bytes bytes, SHA-256 $sha256" "  came:     $came" \
        "  next:     $1" "  by hand:  save that address as $file"
}

start_over() {
    rm -f "$part"
    [ "$restarted" = no ] || give_up "The server does not send the official file. Try another one: HF_ENDPOINT=https://... ./download.sh"
    restarted=yes
    echo "$name: $came, expected $bytes bytes with SHA-256 $sha256; starting over" >&2
}

check_space() {
    local need free # df: the number before the percentage is what is free, in KiB
    need=$((bytes - $(size_of "$part")))
    free=$(df -Pk "$folder" 2>/dev/null | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')
    [ -z "$free" ] || [ $((free * 1024)) -ge "$need" ] || die "$name needs $((need / 1000000)) MB more," \
        "but only $((free * 1024 / 1000000)) MB are free in $folder: make room, or let that folder be a link to a larger disk."
}

is_right() { [ "$(size_of "$1")" -eq "$bytes" ] && [ "$(sha256_of "$1")" = "$sha256" ]; }

# One file, from the globals bytes, sha256 and name.
download() {
    file="$folder/$name" part="$folder/$name.part" url="$base/$name" restarted=no
    local failures=0 delay=$retry_seconds before now
    check_space
    echo "$name: downloading $((bytes / 1000000)) MB from $endpoint"
    until is_right "$part"; do
        before=$(size_of "$part")
        if [ "$before" -ge "$bytes" ]; then
            came="$before bytes with SHA-256 $(sha256_of "$part")"
            start_over
            continue
        fi
        fetch
        now=$(size_of "$part")
        [ "$now" -lt "$bytes" ] || continue
        came="HTTP $code, $now bytes, exit status $status of $tool"
        case $code in
            416) start_over; continue ;;
            200) # the range was ignored, or this is a whole answer and so another page
                if [ "$before" -gt 0 ] || [ "$status" -eq 0 ]; then start_over; continue; fi ;;
            408 | 429) ;;
            4??) give_up "Is HF_ENDPOINT ($endpoint) right, and does a proxy or login page stand in between?" ;;
        esac
        [ "$now" -le "$before" ] || failures=0 delay=$retry_seconds
        failures=$((failures + 1))
        [ "$failures" -le "$retries" ] || give_up "Check the network or try a mirror with HF_ENDPOINT=https://... ; ./download.sh then continues."
        echo "$name: $came; trying again in $delay s" >&2
        sleep "$delay"
        delay=$((delay * 2))
    done
    mv -f "$part" "$file" || die "$part is complete, but cannot be renamed to $file"
}

manifest=$official
if [ -n "${DOWNLOAD_MANIFEST:-}" ]; then
    manifest=$(cat "$DOWNLOAD_MANIFEST") || die "DOWNLOAD_MANIFEST names $DOWNLOAD_MANIFEST, which cannot be read."
    echo "Files, sizes and hashes come from $DOWNLOAD_MANIFEST, not the official list."
fi
choose_tools
mkdir -p "$folder" || die "cannot create $folder"
take_lock
while read -r bytes sha256 name; do
    if [ -f "$folder/$name" ]; then
        echo "$name: checking the file that is there"
        if is_right "$folder/$name"; then
            echo "$name: already there, size and SHA-256 are right"
            continue
        fi
        echo "$name: not the official file; it is replaced once the official one is complete"
    fi
    download
    echo "$name: complete, size and SHA-256 are right"
done <<END
$manifest
END
echo "Done: $folder"
echo "Next: python pre_tokenize.py"
