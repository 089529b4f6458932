"""The content of `eval_results.json` as a table for a terminal."""

from .units import UNITS


def results_table(results: dict) -> str:
    """The arms as aligned lines, the best last, and a line that says what was scored."""
    metric = results["metric"]
    unit, task = UNITS[metric], results["task"]
    heads = f"{'' if metric == 'accuracy' else f'{unit.heading:>12}'}{'accuracy':>12}"
    lines = [f"{'arm':<18}{heads}{'seconds':>9}{'tokens':>13}{'sequential steps':>18}"]
    for arm, scores in sorted(results["arms"].items(), key=lambda entry: -unit.badness(entry[1][metric])):
        mark = " *" if arm == results["student_arm"] else ""
        columns = [] if metric == "accuracy" else [f"{unit.written(scores[metric]):>12}"]
        columns.append(f"{UNITS['accuracy'].written(scores['accuracy']) if 'accuracy' in scores else '':>12}")
        if "wall_clock_s" in scores:
            columns.append(f"{scores['wall_clock_s']:>9.0f}{scores['tokens']:>13,}{scores['sequential_steps']:>18,}")
        lines.append(f"{arm + mark:<18}" + "".join(columns))
    num_rows = f"{results['data']['heldout_streams']:,}"
    what = f"{num_rows} rows of {task['name']}, difficulty {task['difficulty']}, each"
    if task["name"] == "text":
        what = f"{num_rows} streams x {task['difficulty']} tokens"
    elif task["name"] == "instructions":
        what = f"answers of {num_rows} examples, each"
    else:
        lines.append(f"{'chance':<18}{unit.written(task['chance']):>12}")
    teacher = "; teacher: the shared readout on the teacher's memories" if "teacher" in results["arms"] else ""
    lines.append(f"held out: {what} from m_0; * the exported student{teacher}")
    return "\n".join(line.rstrip() for line in lines)
