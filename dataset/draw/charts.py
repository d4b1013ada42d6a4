"""Charts as reports have them, with figures made up for this project."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataset.draw.entry import Entry, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def visitors(axes: Axes) -> None:
    """Bars with their values."""
    bars = axes.bar(["2018", "2019", "2020", "2021", "2022", "2023"], [412, 438, 127, 205, 391, 467], color="#4878a8")
    axes.bar_label(bars)
    axes.set(title="Visitors of the town museum", ylabel="thousands", ylim=(0, 540))


def languages(axes: Axes) -> None:
    """Horizontal bars."""
    shares = {"French": 18, "Spanish": 27, "German": 14, "Mandarin": 9, "Italian": 21, "Arabic": 6}
    axes.barh(list(shares), list(shares.values()), color="#c07830")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set(title="Language courses booked in autumn", xlabel="share of all courses (%)")


def temperatures(axes: Axes) -> None:
    """Two lines."""
    axes.plot(MONTHS, [-1, 1, 5, 9, 14, 18, 20, 19, 15, 10, 4, 0], marker="o", label="Lindau")
    axes.plot(MONTHS, [9, 10, 12, 14, 18, 22, 25, 25, 22, 18, 13, 10], marker="s", label="Porto Verde")
    axes.grid(alpha=0.4)
    axes.legend()
    axes.set(title="Mean temperature", ylabel="°C")


def budget(axes: Axes) -> None:
    """Slices of a circle."""
    axes.pie(
        [34, 22, 16, 12, 9, 7],
        labels=["Rent", "Food", "Transport", "Savings", "Leisure", "Other"],
        autopct="%d%%",
        startangle=90,
        counterclock=False,
    )
    axes.set_title("Monthly spending of a household")


def energy(axes: Axes) -> None:
    """Stacked bars."""
    years = ["2005", "2010", "2015", "2020"]
    parts = {"coal": [52, 44, 31, 18], "gas": [20, 23, 24, 25], "wind": [6, 12, 24, 36], "solar": [1, 4, 11, 17]}
    floor = [0, 0, 0, 0]
    for (name, values), colour in zip(parts.items(), ("#444444", "#b0a090", "#70a8d8", "#f0c040"), strict=True):
        axes.bar(years, values, 0.6, bottom=floor, label=name, color=colour)
        floor = [low + value for low, value in zip(floor, values, strict=True)]
    axes.legend(ncols=4, loc="upper center")
    axes.set(title="Electricity by source", ylabel="TWh", ylim=(0, 122))


def sales(axes: Axes) -> None:
    """Groups of bars."""
    quarters = range(4)
    for shift, (name, values) in enumerate({"North": [31, 42, 38, 55], "South": [27, 30, 45, 41]}.items()):
        bars = axes.bar([quarter + 0.38 * shift for quarter in quarters], values, 0.36, label=name)
        axes.bar_label(bars)
    axes.set_xticks([quarter + 0.19 for quarter in quarters], ["Q1", "Q2", "Q3", "Q4"])
    axes.legend(title="Region", loc="upper left")
    axes.set(title="Bicycles sold per quarter", ylim=(0, 64))


def heights(axes: Axes) -> None:
    """Points and the line through them."""
    ages = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    axes.scatter(ages, [75, 87, 95, 103, 108, 116, 121, 128, 132, 139], color="#308050", label="measured")
    axes.plot([1, 10], [80, 140], "--", color="grey", label="linear trend")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.set(title="Height of a child", xlabel="age (years)", ylabel="cm")


def marks(axes: Axes) -> None:
    """How often each value came up."""
    axes.bar(range(1, 11), [0, 1, 2, 2, 5, 8, 9, 6, 4, 1], width=1, color="#a06cb0", edgecolor="white")
    axes.set_xticks(range(1, 11))
    axes.set(title="Marks in the final test (38 pupils)", xlabel="mark", ylabel="number of pupils")


def stock(axes: Axes) -> None:
    """An area with a mark."""
    days = list(range(1, 15))
    litres = [900, 860, 810, 700, 640, 580, 950, 900, 830, 790, 720, 690, 610, 560]
    axes.fill_between(days, litres, color="#a8c8e8")
    axes.plot(days, litres, color="#205080")
    axes.annotate("delivery", (7, 950), (8.6, 985), arrowprops={"arrowstyle": "->"})
    axes.set(title="Heating oil in the tank", xlabel="day of March", ylabel="litres", ylim=(400, 1040), xlim=(1, 14))


def timetable(axes: Axes) -> None:
    """A coloured table."""
    counts = [[12, 30, 18, 5], [14, 33, 21, 7], [11, 28, 25, 9], [16, 35, 29, 12], [22, 41, 38, 26]]
    axes.imshow(counts, cmap="Oranges", aspect="auto")
    axes.set_xticks(range(4), ["8-11 h", "11-14 h", "14-17 h", "17-20 h"])
    axes.set_yticks(range(5), ["Mon", "Tue", "Wed", "Thu", "Fri"])
    for row, values in enumerate(counts):
        for column, value in enumerate(values):
            axes.text(column, row, str(value), ha="center", va="center", color="white" if value > 30 else "black")
    axes.set_title("Guests in the café")


ENTRIES = [
    Entry("In which year did the museum have the fewest visitors, and how many were there?", figure(visitors)),
    Entry("How many percentage points more were booked of Spanish than of German courses?", figure(languages)),
    Entry("In which month is the difference between the two towns smallest?", figure(temperatures)),
    Entry("What share of the spending goes to rent and food together?", figure(budget)),
    Entry("Which source grew the most between 2005 and 2020?", figure(energy)),
    Entry("In which quarter did the South sell more bicycles than the North?", figure(sales)),
    Entry("At what age was the child first taller than 120 cm?", figure(heights)),
    Entry("How many pupils got a mark of 8 or better?", figure(marks)),
    Entry("Describe in one sentence how the amount of heating oil changes over the two weeks.", figure(stock)),
    Entry("On which day and at what time does the café have the most guests?", figure(timetable)),
]
