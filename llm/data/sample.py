"""Built-in stories for `--sample`: about 2 MB of small tales from a seeded grammar, so nothing has to be downloaded.

For each story a cast of names and things is drawn from WORDS, and one of the PLOTS is told with it. In both, `[a|b|c]`
means one of the three, and `{name}` is filled in from the cast. The stories are enough for a loss curve that falls and
for a small model that writes something like a story. They are no substitute for TinyStories.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llm.data.files import ARRAY_FILES
from llm.data.stories import END_OF_TEXT
from llm.data.tokenize import pre_tokenize
from llm.files import write_atomically

N_STORIES = {"train": 3_450, "eval": 180}

GIRLS = "[Lily|Mia|Anna|Sue|Emma|Zoe|Ruby|Nora|Ella|Rosie|Maya|Ivy|Clara|Jane|Tess|Lola|Amy|Daisy|Kate|Hana]"
BOYS = "[Tom|Ben|Max|Sam|Leo|Finn|Jack|Tim|Oscar|Noah|Eli|Hugo|Adam|Luke|Omar|Theo|Joe|Ravi|Peter|Milo]"
CREATURE = "[rabbit|fox|bear|mouse|duck|squirrel|hedgehog|kitten|puppy|frog|turtle|pony|lamb|otter|beaver]"

WORDS = {
    "trait": "[little|happy|curious|kind|brave|quiet|funny|clever|shy|cheerful|gentle|busy|young|small|friendly]",
    "grown_up": "{his} [mom|dad|grandma|grandpa|aunt|uncle|teacher|neighbor]",
    "place": "[park|garden|forest|meadow|beach|farm|playground|market|field|river|lake|village|yard|pond|zoo]",
    "color": "[red|blue|green|yellow|purple|orange|pink|white|brown|golden|silver]",
    "toy": "[ball|kite|drum|doll|boat|car|train|robot|teddy|top|hat|scarf|whistle|puzzle|bucket|lantern|bell]",
    "animal": "[bird|kitten|puppy|bunny|turtle|frog|duckling|hedgehog|squirrel|lamb|butterfly|goat|mouse]",
    "food": "[apples|cookies|berries|pancakes|carrots|pears|nuts|cherries|sandwiches|plums|muffins|grapes|oranges]",
    "spot": "[under a bench|behind a big tree|in the tall grass|next to a round stone|under a bush|beside the path]",
    "wrong": "[inside an old log|in a pile of leaves|near the gate|behind the shed|under the bridge|in a basket]",
    "game": "[hide and seek|tag|catch|jump rope|a guessing game|pirates|kings and queens|follow the leader]",
    "skill": "[swim|ride a bike|whistle|tie a bow|fly a kite|skip stones|read a book|dance|play the drum|draw a horse"
    "|bake bread|sing a song|build a tower|skate|paddle a boat|count to one hundred|climb the rope]",
    "fun": "[a tent from blankets|a castle from boxes|a train from chairs|a boat from pillows|a town from blocks]",
    "thing": "[cup|vase|plate|clock|lamp|flower pot|teapot|picture frame]",
    "noise": "[Tap, tap, tap|Scratch, scratch|Bump, bump, bump|Squeak, squeak|Rustle, rustle|Knock, knock]",
    "room": "[under the bed|at the window|behind the door|in the closet|in the kitchen|on the stairs]",
    "plant": "[sunflower|pumpkin|apple tree|bean plant|rose bush|tomato plant|melon|cherry tree]",
    "missing": "[eggs|milk|flour|sugar|butter|honey]",
    "very": "[very|so|really]",
    "said": "[said|asked|cried]",
}

OPENING = (
    "[Once upon a time, there was|One day, there was|Once there was|In a small town, there lived|Long ago, there was] "
    "[a {trait} {kind} named {name}|a {kind} named {name}, who was {very} {trait}]. "
    "[{name} loved to|{name} liked to|Every day, {name} would] "
    "[play in the {place}|eat {food}|look at the clouds|sing a song|run and jump|play {game}|feed the {animal}s]."
)

PLOTS = (  # (which lesson ends the story, the story)
    (  # something is lost and found
        "helping",
        """{He} had a {color} {toy} and took it everywhere. One [morning|afternoon|sunny day], {he} went to the \
{place}, and the {toy} was gone!
"Oh no! Where is my {toy}?" {said} {name}. {friend} heard {him} and came [to help|running]. They looked {wrong}, \
but it was not there. [They did not give up.|{name} felt {very} sad.|They looked and looked.] Then {friend} looked \
{spot} and [laughed|shouted|smiled]. "Here is your {color} {toy}!"
{name} hugged {friend} and said, "[Thank you|You are the best|I am so glad]!" They played with the {toy} until \
[dinner|the sun went down|it was time to go home].""",
    ),
    (  # an animal is stuck
        "helping",
        """One day, {he} walked to the {place} and heard a [tiny|sad|strange|soft] sound. A {color} {animal} was \
stuck [high up in a tree|in a deep hole|in a thick bush|behind a fence|between two rocks]!
"Do not be afraid," said {name}. "I will [help you|get you out|come back soon]." {name} [pulled and pulled|tried \
to reach it|stood on tiptoe], but {he} was too small. So {he} ran to {grown_up}. Together they brought [a long \
stick|a ladder|a rope|a warm blanket|a strong branch] and worked [slowly|with care|for a long time]. At last, the \
{animal} was free.
The {animal} [jumped for joy|looked at {him} with bright eyes|followed {him} home]. After that, the {animal} came \
to see {name} [every day|every morning|each spring].""",
    ),
    (  # sharing
        "sharing",
        """One day, {grown_up} gave {him} a bag of {food}. {name} sat down in the {place} to eat them all alone.
{friend} came by and asked, "May I have [some|one|a few], please?"
"[No, they are mine|No, I want them all|Go away, these are mine]!" said {name}. {friend} [walked away|looked at \
the ground|went home] and felt {very} [sad|hurt|lonely]. {name} ate and ate, but the {food} did not taste \
[good|sweet|nice] anymore. {He} thought about {friend}.
So {name} ran to {friend} and said, "I am sorry. Let us [share|eat together|have half each]." They ate the {food} \
[side by side|and laughed|and told jokes].""",
    ),
    (  # learning to do something
        "trying",
        """More than anything, {name} wanted to {skill}. {friend} could {skill} [very well|already|with no help], \
but {name} could not.
{name} tried [once|twice|three times|all day] and [fell down|got it wrong|had to stop]. "I will never {skill}!" \
{he} [cried|said|shouted]. Then {grown_up} sat down next to {him} and said, "[Try a little every day|Go slowly and \
try again|When I was small, I could not do it either]."
So {name} [tried in the {place}|tried again the next day|tried every morning]. [After a week|After many days|Then \
one day], {he} could {skill}! {friend} [clapped|cheered|was amazed], and {name} felt {very} [proud|happy].""",
    ),
    (  # the weather spoils a plan
        "friendship",
        """{name} and {friend} wanted to go to the {place}. They packed {food} and a {color} {toy}.
But then the sky turned [dark|gray|black]. [It began to rain|Big drops fell down|A cold wind came|Thunder \
rolled|Thick snow fell]! "Now our day is [ruined|no fun|over]," said {friend}. They looked out of the window and \
felt {very} [sad|bored|cross]. But {grown_up} had an idea. "[Why not make|You could build|Let us make] {fun}!"
So they made {fun} and ate the {food} inside. The {toy} was [the king|the captain|their guest|the driver]. When \
the sun came back, "[Can we do this again|Let us stay here|This was the best day]!" said {friend}.""",
    ),
    (  # something breaks
        "truth",
        """One day, {he} played [inside|in the kitchen|in the hall] with a {color} {toy}. Crash! The {toy} hit a \
{thing}, and the {thing} broke.
{name} was {very} [scared|worried]. {He} hid the pieces [under the bed|in a box|behind a chair]. Then {grown_up} \
came in and asked, "Where is the {thing}?" {name} [said nothing|looked away|turned red]. But {his} tummy felt \
[bad|heavy|strange]. At last {he} said, "I broke the {thing}. I am [so|very|really] sorry."
"Thank you for telling me," said {grown_up}. "[We can fix it|It was only a {thing}|I am not angry]." They [put the \
pieces together|cleaned up together|made a new {thing} from clay].""",
    ),
    (  # a new friend
        "friendship",
        """One day, {he} saw someone new in the {place}. It was {friend}, who sat {spot} all alone.
{name} walked over and said, "Hi, I am {name}. [Do you want to play|Will you play with me|Shall we play]?" \
{friend} [looked up|was shy|smiled a little] and said, "I do not know how to play {game}."
"[That is easy|I will show you|We can learn it together]!" said {name}. So they played {game} [all afternoon|again \
and again|until they were tired]. A {color} {animal} came to watch them.
Then they shared some {food}. "[You are my first friend here|I had so much fun|Let us meet again]," said {friend}.""",
    ),
    (  # a noise at night
        "courage",
        """One night, {name} lay in bed and could not sleep. {noise}! Something was {room}.
"Is it a [monster|ghost|dragon|witch]?" thought {name}. {He} felt {very} [scared|afraid] and held {his} {color} \
{toy}. [Then it came again|It grew louder|It did not stop]. {noise}! {name} called {grown_up}. "Let us [take a \
look|be brave|find out] together," said {grown_up} and took a light.
They looked {room}, and there sat a small {animal}! It was [cold|hungry|lost|more scared than {name}]. {name} \
laughed and gave it some {food}. Then {he} slept [well|until morning|like a stone].""",
    ),
    (  # a seed
        "patience",
        """One day, {he} found a tiny seed in the {place}. "What will you be?" {he} asked. {Grown_up} said, "[Put \
it in the ground and wait|Give it water and sun|Plant it, and you will see]."
{name} planted the seed {spot}. {He} gave it water [every day|every morning|each night]. But nothing came up. \
{friend} said, "It is [only a stone|too small|asleep]." {name} [did not give up|waited and waited|sang to it].
After [two|three|four|many] weeks, a green leaf came out! It grew and grew until it was a [big|tall|fine] {plant}. \
Even a {animal} came to live [near it|beside it|in its shade]. {name} showed the {plant} to {friend}, who was \
{very} [surprised|happy|amazed].""",
    ),
    (  # a birthday
        "sharing",
        """It was {friend}'s birthday, and {name} wanted to make a surprise. {He} had a {color} {toy} to give, and \
{he} wanted to bake a cake.
But there was no {missing}! "[What can I do|Now there is no cake|Oh dear]!" said {name}. {He} went to [the \
shop|the farm|the house next door], and there {he} met {grown_up}. "I have {missing} for you," said {grown_up}. \
{name} said thank you and ran home to [mix|stir|bake]. On top of the cake {he} put some {food}.
When {friend} came, {name} shouted, "[Surprise|Happy birthday]!" {friend} loved the cake and the {toy}. They \
played {game} [all day|in the {place}|until night].""",
    ),
    (  # lost in the wild
        "courage",
        """One day, {he} saw a {color} {animal} and followed it far across the {place}. {He} walked and walked. \
When {he} looked back, {he} did not know the way home.
{name} sat down {spot} and [began to cry|took a deep breath|felt {very} lonely]. Then {he} remembered what \
{grown_up} always said. "If you are lost, [stay where you are|ask for help|stay calm and call out]." So {name} \
called, "Hello! Can anyone hear me?" {friend} was [not far away|picking {food}|near the water] and heard {him}.
"I know the way," said {friend}. "[Come with me|Take my hand|It is not far]." Soon they were home and ate {food}. \
{name} was {very} [happy|glad] to be back.""",
    ),
    (  # a race
        "friendship",
        """There was a big race near the {place}. The prize was [a basket of {food}|a {color} {toy}]. {name} and \
{friend} both wanted to win.
"Ready, steady, go!" said {grown_up}. {name} ran as fast as {he} could and was soon ahead. Then {he} heard a cry. \
{friend} had [fallen|tripped over a root|lost a shoe]! {name} looked at the [finish|flag|line]. It was so close. \
But {he} [turned around|ran back].
"[Are you all right|Does it hurt|Can you stand]?" asked {name}. {He} helped {friend} up, and they crossed the line \
[last|together|hand in hand]. Everyone clapped, and a {animal} [danced|jumped up and down|ran beside them].""",
    ),
)

LESSONS = {
    "sharing": "[sharing makes everyone happy|a thing is more fun when you share it|there is always enough for two]",
    "trying": "[you can learn anything if you keep trying|hard things get easy with time|it is fine to fail at first]",
    "truth": "[it is best to tell the truth|telling the truth makes you feel light|honest words can fix a lot]",
    "helping": "[helping others feels good|even someone small can be a big help|we can do more together]",
    "courage": "[you can be scared and still be brave|most scary things are not so scary up close]",
    "friendship": "[a kind word can start a friendship|a friend can be found anywhere|friends make any day better]",
    "patience": "[good things take time|it is good to be patient|small steps every day make big things grow]",
}
ENDING = (
    "[{name} learned that {lesson}.|From that day on, {name} knew that {lesson}."
    "|{name} was glad to know that {lesson}."
    "|That night, {name} fell asleep with a smile. {He} knew that {lesson}.]"
)


def choose(text: str, rng: random.Random) -> str:
    """Replace every `[a|b|c]` by one of its parts, the innermost brackets first."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda choice: rng.choice(choice[1].split("|")), text)
    return text


def tell(rng: random.Random) -> str:
    """Return one story."""
    girl = rng.random() < 0.5
    cast = dict(zip(("he", "him", "his"), ("she", "her", "her") if girl else ("he", "him", "his"), strict=True))
    cast |= {slot: choose(words, rng).format(**cast) for slot, words in WORDS.items()}
    cast["name"] = choose(GIRLS if girl else BOYS, rng)
    cast["friend"] = choose(f"[{GIRLS}|{BOYS}]".replace(cast["name"] + "|", "").replace("|" + cast["name"], ""), rng)
    cast["kind"] = choose(f"[girl|girl|{CREATURE}]" if girl else f"[boy|boy|{CREATURE}]", rng)
    cast |= {"He": cast["he"].capitalize(), "Grown_up": cast["grown_up"].capitalize()}
    lesson, plot = rng.choice(PLOTS)
    ending = ENDING.replace("{lesson}", choose(LESSONS[lesson], rng))
    story = choose(f"{OPENING}\n{plot} {ending}", rng).format(**cast)
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", story)


def all_stories(seed: int = 0) -> Iterator[str]:
    """Yield stories without end, no two alike."""
    rng, told = random.Random(seed), set()
    while True:
        story = tell(rng)
        if story not in told:
            told.add(story)
            yield story


def sample_stories() -> dict[str, list[str]]:
    """Return the stories of "train" and "eval", the same ones every time; the two splits have none in common."""
    stories = all_stories()
    return {split: list(islice(stories, n)) for split, n in N_STORIES.items()}


def make_sample(folder: str | Path = Path("data/sample"), vocab_size: int = 10_000) -> Path:
    """Write the built-in stories and their arrays into `folder` unless they are complete already; return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"sample_{split}.txt" for split in ARRAY_FILES}
    for split, stories in sample_stories().items():
        path, text = paths[split], "".join(f"{story}\n{END_OF_TEXT}\n" for story in stories).encode()
        if not path.is_file() or path.read_bytes() != text:
            write_atomically(path, text)
    pre_tokenize(paths["train"], paths["eval"], folder, vocab_size)
    return folder
