"""The part of the sbatch script that makes a site's environment: variables, then the lines of `setup:`.

A line runs in the script's own shell, since it sets variables, and without `set -e` or `set -u`, which modules and
conda do not survive. One that fails, is no bash, or leaves the shell ends the job, which is not requeued; `<job>.crash`
tells `status` which it was.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from slurm.site import SiteFile

BEGIN = """\
site_job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
site_log=FOLDER/${site_job}_0_log.out site_directory=$PWD
site_begin() {
  site_line=$1 site_seen=$(stat -c %s "$site_log" 2>/dev/null)
}
site_end() {
  set +eu
  [ "$1" -eq 0 ] || site_failed "$1"
}
site_failed() {
  trap - EXIT
  set +eu
  site_code=$1
  [ "$site_code" -ne 0 ] || site_code=1  # it has left the shell
  # What it has printed: the last line that looks like an error, or the last one.
  site_said=$(tail -c +$((${site_seen:-0} + 1)) "$site_log" 2>/dev/null | awk '
    /[Ee]rror|not found|No such|denied|unbound/ { error = $0 } NF { last = $0 } END { print error ? error : last }')
  echo "error: $site_line: exit code $site_code"
  cd FOLDER || exit $site_code
  rm -f "$site_job".started
  # Only a failure: not an end that Slurm is already bringing about, nor one that was requested.
  site_state=$(squeue --noheader --jobs="$site_job" --format=%T)
  if [ "${site_state:-RUNNING}" = RUNNING ] && [ ! -e "$site_job".over ]; then
    echo "$(date +%s.%N) $((SECONDS + 2)) $site_code $site_line: ${site_said:-it printed nothing}" > "$site_job".crash
  fi
  exit $site_code
}
trap 'site_failed $?' EXIT"""

END = """\
trap - EXIT
cd "$site_directory" || exit  # where relative paths begin"""


def setup_lines(site: SiteFile, folder: Path) -> list[str]:
    """Lines of bash; none for a site without variables and setup.

    Args:
        folder: of the logs and of `<job>.crash`.
    """
    lines = [f"# variables of {site.path}"] if site.env else []
    lines += [f"export {name}={_quoted(value)}" for name, value in site.env.items()]
    if not site.setup:
        return lines
    lines += BEGIN.replace("FOLDER", shlex.quote(str(folder))).splitlines()
    for number, text in enumerate(site.setup, 1):
        first, *others = text.strip().splitlines() or [""]
        label = f"line {number} of setup in {site.path}, {first}{' ...' if others else ''}"
        mark = "END"
        while mark in text.splitlines():
            mark += "_"
        lines += ["", f"site_begin {shlex.quote(label)}", f"IFS= read -r -d '' site_text <<'{mark}' || :"]
        lines += [*text.rstrip("\n").splitlines(), mark, 'eval "$site_text"', "site_end $?"]
    return [*lines, "", *END.splitlines()]


def _quoted(value: str) -> str:
    """In double quotes, in which the shell replaces $NAME and nothing else."""
    return '"' + re.sub(r'(["\\`])', r"\\\1", value) + '"'
